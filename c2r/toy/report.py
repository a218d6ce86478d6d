"""The report of the quickstart: a contact sheet, a short film, and a table of losses, control and look."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange
from PIL import Image

from c2r.data.contact_sheet import draw_contact_sheet
from c2r.data.video import read_window
from c2r.models.contract import read_contract
from c2r.models.vae import decode_frames, encode_frames
from c2r.toy import city
from c2r.toy.appearance import gradient_energy, recognise_weather_and_walls
from c2r.toy.folder import Toy, read_toy
from c2r.toy.layout import correlations, edge_map, people_correlations

SHOWN_SCENES = 5
#: Weathers and walls under which the first test scene is shown too: the layout stays, the look changes.
OTHER_APPEARANCES = (("sunny", "brick"), ("snowy", "stone"), ("rainy", "yellow"), ("night", "blue"))


def scenes_under_other_prompts(toy: Toy) -> list[city.Scene]:
    """Return the first test scene in each of `OTHER_APPEARANCES`."""
    scene = city.make_scene(toy["test"][0]["seed"])
    return [replace(scene, sky=sky, material=material) for sky, material in OTHER_APPEARANCES]


def write_report(
    folder: Path, toy_dir: Path, phase1: Path, phase2: Path, videos: dict[str, list[Path]]
) -> dict[str, float]:
    """Write report.png, with the first test scenes, report.webp, which moves, and report.json.

    Args:
        folder: gets the files.
        toy_dir: the toy's folder.
        phase1, phase2: output folders of the training.
        videos: "before" (phase 2) and "generated", one for each test scene; "other prompts", one for each of
            `OTHER_APPEARANCES`.

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
    prompted = scenes_under_other_prompts(toy)
    clips = {name: [_read_clip(path, toy) for path in paths] for name, paths in (videos | {"truth": truth}).items()}
    controls = [_read_clip(path, toy) for path in coarse]
    _draw_film(folder / "report.webp", toy["fps"], scenes, controls, clips["generated"], clips["other prompts"])

    vae = AutoencoderKLWan.from_pretrained(toy_dir / "model/vae", torch_dtype=torch.float32)
    clips["reconstructed"] = [_reconstruct(vae, clip) for clip in clips["truth"]]
    clips = {name: [clip.float() for clip in of_name] for name, of_name in clips.items()}
    people = {name: people_correlations(scenes, clips[name], toy["fps"]) for name in ("before", "generated", "truth")}
    people["other prompts"] = people_correlations(prompted, clips["other prompts"], toy["fps"])
    edges = {name: [edge_map(clip) for clip in clips[name]] for name in ("generated", "truth", "reconstructed")}
    own_edges, other_edges = correlations(edges["generated"], edges["truth"])
    energies = {name: np.array([*map(gradient_energy, clips[name])]) for name in ("generated", "reconstructed")}
    sharpness = energies["generated"] / energies["reconstructed"]
    weather, walls = _recognised(scenes, clips["generated"], toy["fps"])
    other_weather, other_walls = _recognised(prompted, clips["other prompts"], toy["fps"])
    adapted, grounded = _metrics(phase1 / "best"), _metrics(phase2 / "best")
    table = {
        "phase 1: validation loss before the first step": adapted["loss_at_start"],
        "phase 1: validation loss": adapted["loss"],
        "phase 2: validation loss, right control": grounded["loss"],
        "phase 2: validation loss, another clip's control": grounded["loss_other_control"],
        "phase 2: validation loss, no control": grounded["loss_no_control"],
        "people correlation, own scene": people["generated"][0],
        "people correlation, other scenes": people["generated"][1],
        "people correlation, first scene under other prompts": people["other prompts"][0],
        "people correlation before phase 2, own scene": people["before"][0],
        "people correlation of the true clips (ceiling)": people["truth"][0],
        "edge correlation, own scene": own_edges,
        "edge correlation, other scenes": other_edges,
        "edge correlation of the true clips through the VAE (ceiling)": correlations(
            edges["reconstructed"], edges["truth"]
        )[0],
        "gradient energy, share of the true clip's through the VAE": sharpness.mean(),
        "gradient energy, lowest share of a clip": sharpness.min(),
        "gradient energy, highest share of a clip": sharpness.max(),
        "clips that show the weather of their prompt": weather,
        "clips that show the walls of their prompt": walls,
        "other prompts: clips that show their weather": other_weather,
        "other prompts: clips that show their walls": other_walls,
        "CG share of the samples in phase 2": _metrics(phase2 / "final")["cg_share"],
    }
    table = {name: float(value) for name, value in table.items()}
    (folder / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


@torch.no_grad()
def _reconstruct(vae, clip):
    """Encode and decode a clip (F, 3, H, W) uint8."""
    return torch.from_numpy(decode_frames(vae, encode_frames(vae, clip[None])[0][0])).permute(0, 3, 1, 2)


def _recognised(scenes, clips, fps):
    """Return the shares of clips that show the weather and the walls of their scene."""
    right = [
        (scene.sky == weather, scene.material == walls)
        for scene, clip in zip(scenes, clips)
        for weather, walls in [recognise_weather_and_walls(scene, clip, fps)]
    ]
    return np.mean(right, axis=0)


def _draw_film(path, fps, scenes, controls, generated, other_prompts):
    """Draw a film of clips (F, 3, H, W) uint8: controls and what is generated with them, above one scene's prompts."""
    controls, generated, other_prompts = (
        [rearrange(clip, "f c h w -> f h w c").numpy() for clip in clips]
        for clips in (controls, generated, other_prompts)
    )
    pictures = []
    for t in range(len(controls[0])):
        now = slice(t, t + 1)
        shown = list(zip(scenes, controls, generated))[:SHOWN_SCENES]
        columns = {f"{i}: {s.sky}, {s.material}": [c[now], g[now]] for i, (s, c, g) in enumerate(shown, 1)}
        one_scene = {"control of 1": [controls[0][now]]}
        one_scene |= {f"{sky}, {walls}": [clip[now]] for (sky, walls), clip in zip(OTHER_APPEARANCES, other_prompts)}
        parts = [
            draw_contact_sheet(columns, ["coarse control", "generated"]),
            draw_contact_sheet(one_scene, ["generated from one control under other prompts"]),
        ]
        picture = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), "white")
        picture.paste(parts[0])
        picture.paste(parts[1], (0, parts[0].height))
        pictures.append(picture)
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0, quality=85)


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
