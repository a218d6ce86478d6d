"""The report of the quickstart: a contact sheet, a short film, and a table of losses, control and look."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from PIL import Image, ImageDraw

from c2r.data.contact_sheet import draw_contact_sheet
from c2r.data.text_drawing import draw_text
from c2r.data.video import read_window
from c2r.models.contract import read_contract
from c2r.models.vae import decode_latents, encode_frames
from c2r.toy import city
from c2r.toy.folder import Toy, read_toy
from c2r.toy.layout import correlations, edge_map, people_correlations
from c2r.toy.look import gradient_energy, recognise

SHOWN_SCENES = 5
#: Weathers and walls under which the first test scene is shown: the layout stays, the look changes.
SHOWN_LOOKS = (("sunny", "brick"), ("snowy", "stone"), ("dusk", "yellow"), ("night", "blue"))


def scenes_of_looks(toy: Toy) -> list[city.Scene]:
    """Return the first test scene in each of `SHOWN_LOOKS`."""
    scene = city.make_scene(toy["test"][0]["seed"])
    return [replace(scene, sky=sky, material=material) for sky, material in SHOWN_LOOKS]


def write_report(
    folder: Path, toy_dir: Path, phase1: Path, phase2: Path, videos: dict[str, list[Path]]
) -> dict[str, float]:
    """Write report.png, with the first test scenes, report.webp, which moves, and report.json.

    Args:
        folder: gets the files.
        toy_dir: the toy's folder.
        phase1, phase2: output folders of the training.
        videos: "before" (phase 2) and "generated", one for each test scene; "looks", one for each of `SHOWN_LOOKS`.

    Returns:
        the content of report.json: {description: value}.
    """
    toy = read_toy(toy_dir)
    coarse: list[str | Path] = [scene["control_video"] for scene in toy["test"]]
    truth: list[str | Path] = [scene["truth"] for scene in toy["test"]]
    columns: dict[str, list[str | Path]] = {
        "coarse control": coarse,
        "before phase 2 (no control)": list(videos["before"]),
        "generated": list(videos["generated"]),
        "truth": truth,
    }
    draw_report(folder / "report.png", toy, columns)

    scenes = [city.make_scene(scene["seed"]) for scene in toy["test"]]
    clips = {
        name: [_read_clip(path, toy).float() for path in paths] for name, paths in (videos | {"truth": truth}).items()
    }
    clips["true, through the VAE"] = _reconstruct(toy_dir, clips["truth"])
    controls = [_read_clip(path, toy).float() for path in coarse]
    _draw_film(folder / "report.webp", scenes, controls, clips["generated"], clips["looks"])

    people = {name: people_correlations(scenes, clips[name], toy["fps"]) for name in ("before", "generated", "truth")}
    edges = correlations(*([edge_map(clip) for clip in clips[name]] for name in ("generated", "truth")))
    prompted = [*zip(scenes, clips["generated"]), *zip(scenes_of_looks(toy), clips["looks"])]
    shown = [(scene, *recognise(scene, clip, toy["fps"])) for scene, clip in prompted]
    sharpness = gradient_energy(clips["generated"]) / gradient_energy(clips["true, through the VAE"])
    adapted, grounded = _metrics(phase1 / "best"), _metrics(phase2 / "best")
    table = {
        "phase 1: validation loss before the first step": adapted["loss_at_start"],
        "phase 1: validation loss": adapted["loss"],
        "phase 2: validation loss, right control": grounded["loss"],
        "phase 2: validation loss, another clip's control": grounded["loss_other_control"],
        "phase 2: validation loss, no control": grounded["loss_no_control"],
        "people correlation, own scene": people["generated"][0],
        "people correlation, other scenes": people["generated"][1],
        "people correlation before phase 2, own scene": people["before"][0],
        "people correlation of the true clips (ceiling)": people["truth"][0],
        "edge correlation, own scene": edges[0],
        "edge correlation, other scenes": edges[1],
        "gradient energy, share of the true clips' through the VAE": sharpness,
        "clips that show the weather of their prompt": np.mean([s.sky == sky for s, sky, _ in shown]).item(),
        "clips that show the walls of their prompt": np.mean([s.material == walls for s, _, walls in shown]).item(),
        "CG share of the samples in phase 2": _metrics(phase2 / "final")["cg_share"],
    }
    (folder / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


@torch.no_grad()
def _reconstruct(toy_dir, clips):
    """Encode and decode clips (F, 3, H, W) in [0, 255] by the toy's VAE."""
    vae = AutoencoderKLWan.from_pretrained(toy_dir / "model/vae", torch_dtype=torch.float32)
    latents = [encode_frames(vae, clip[None])[0] for clip in clips]
    decoded = [decode_latents(vae, latent)[0].clamp(-1, 1) for latent in latents]
    return [rearrange((pixel_values + 1) * 127.5, "c f h w -> f c h w") for pixel_values in decoded]


def _draw_film(path, scenes, controls, generated, looks, width=200):
    """Draw a film of clips (F, 3, H, W) in [0, 255]: controls, videos made with them, one scene in four looks."""
    rows = [
        [("coarse control", clip) for clip in controls[: len(looks)]],
        [(f"generated: {scene.sky}, {scene.material}", clip) for scene, clip in zip(scenes, generated[: len(looks)])],
        [(f"first scene: {sky}, {walls}", clip) for (sky, walls), clip in zip(SHOWN_LOOKS, looks)],
    ]
    num_frames, _, *size = looks[0].shape
    height, gap, line = round(width * size[0] / size[1]), 4, 16
    frames = []
    for t in range(num_frames):
        frame = Image.new("RGB", (len(looks) * (width + gap) - gap, len(rows) * (height + line)), "white")
        draw = ImageDraw.Draw(frame)
        for i, row in enumerate(rows):
            for j, (title, clip) in enumerate(row):
                x, y = j * (width + gap), i * (height + line)
                draw_text(draw, (x + 2, y + 2), title)
                pixels = clip[t].permute(1, 2, 0).to(torch.uint8).numpy()
                frame.paste(Image.fromarray(pixels).resize((width, height)), (x, y + line))
        frames.append(frame)
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=200, loop=0, quality=85)


def draw_report(path: Path, toy: Toy, columns: dict[str, list[str | Path]]):
    """Draw the contact sheet of the first test scenes.

    Args:
        path: the PNG to write.
        toy: content of toy.json.
        columns: {title: one video for each test scene}.
    """
    clips = {
        title: [rearrange(_read_clip(video, toy), "f c h w -> f h w c").numpy() for video in videos[:SHOWN_SCENES]]
        for title, videos in columns.items()
    }
    draw_contact_sheet(clips, [scene["prompt"] for scene in toy["test"][:SHOWN_SCENES]]).save(path)


def _read_clip(path, toy) -> torch.Tensor:
    """Return the frames of one of the toy's videos, (F, 3, H, W) uint8."""
    return read_window(path, 0.0, toy["num_frames"], toy["fps"], toy["height"], toy["width"])


def _metrics(folder):
    return read_contract(folder).metrics
