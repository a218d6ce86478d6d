"""The report of the quickstart: a contact sheet and a table of losses and control."""

import json
from pathlib import Path

import torch
from einops import rearrange

from c2r.data.contact_sheet import draw_contact_sheet
from c2r.data.video import read_window
from c2r.models.contract import read_contract
from c2r.toy import city
from c2r.toy.folder import Toy
from c2r.toy.layout import people_correlations

SHOWN_SCENES = 5


def write_report(
    folder: Path, toy: Toy, phase1: Path, phase2: Path, videos: dict[str, list[Path]]
) -> dict[str, float]:
    """Write report.png, with the first test scenes, and report.json.

    Args:
        folder: gets both files.
        toy: content of toy.json.
        phase1, phase2: output folders of the training.
        videos: "before" (phase 2) and "generated", one for each test scene.

    Returns:
        the content of report.json: {description: value}.
    """
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
    people = {
        name: people_correlations(scenes, [_read_clip(path, toy).float() for path in paths], toy["fps"])
        for name, paths in (videos | {"truth": truth}).items()
    }
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
        "CG share of the samples in phase 2": _metrics(phase2 / "final")["cg_share"],
    }
    (folder / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    return table


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
