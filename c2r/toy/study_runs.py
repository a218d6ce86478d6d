"""The runs of the study: phase 2 on the toy city in many settings, and what each run is measured by."""

import csv
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from c2r import InputError
from c2r.data.video import read_window
from c2r.models.contract import read_contract
from c2r.toy import city
from c2r.toy.commands import LAUNCH, PHASE1, PHASE2, run_command
from c2r.toy.folder import Toy, read_toy
from c2r.toy.layout import correlations, edge_map, people_correlations
from c2r.toy.leaking_dinov3 import write_early_dinov3, write_look_dinov3, write_pixel_dinov3
from c2r.toy.study_results import MEASURES, Result
from c2r.training.output_files import SAMPLE_COLUMNS

RATIOS = (0.0, 0.1, 0.2, 0.5, 1.0)
#: Folders of the extractors with a planted leak, see `c2r.toy.leaking_dinov3`.
PIXELS, EARLY, LOOK = "pixel_dinov3", "early_dinov3", "look_dinov3"
#: Folder of the CG pairs whose captions name the CG look.
NAMED_CG = "named_cg"
#: Numbers of directions of the control's projection, for the trade-off between leak and control.
DIRECTIONS = (4, 16, 64)
#: Steps of a probe: a run that is cut short, to see if it foretells the whole one.
PROBE_STEPS = 30
#: Steps of longer runs, to see if a remedy costs control or only slows its start.
LONG_STEPS = 300
#: Options of every run, over those of the toy's phase2.yaml.
OPTIONS = {
    "max_train_steps": 100,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "validation_steps": 100,
    "num_validation_clips": 4,
    "num_samples": 8,
    "sample_steps": 100,
    "num_inference_steps": 12,
}


@dataclass(frozen=True)
class StudyRun:
    """A setting of phase 2 that the study tries."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)  #: of phase 2, over `OPTIONS`
    baseline: str | None = None  #: name of the setting that it is compared with
    adapted: bool = True  #: starts from phase 1; else from the toy's base model
    dinov3: str | None = None  #: folder of an extractor with a planted leak; None: the toy's own
    named_cg: bool = False  #: captions of CG pairs name their look; else they are like those of real clips


def planned_runs() -> list[StudyRun]:
    """Return all settings of the study."""
    # Starts at 0.5, samples often and acts on the first warning.
    controller = {
        "cg_ratio": 0.5,
        "cg_ratio_min": 0.05,
        "monitor_bound": 0.15,
        "monitor_patience": 1,
        "sample_steps": 20,
    }
    # As many directions as agree between looks, without and with a random tail dropped.
    chosen: dict[str, dict[str, Any]] = {
        "projection": {"control_projection": "fit"},
        "projection, tail drop 0.5": {"control_projection": "fit", "control_tail_drop": 0.5},
    }
    many: dict[str, dict[str, Any]] = {
        "64 directions, tail drop 0.5": _directions(64) | {"control_tail_drop": 0.5},
    }
    half_cg: dict[str, dict[str, Any]] = {
        "controller": controller,
        "real weight 4": {"real_weight": 4.0},
        "adversarial 0.1": {"adversarial_weight": 0.1},
    }
    fifth_cg: dict[str, dict[str, Any]] = {
        "augmentation 0.5": {"control_augmentation": 0.5},
        **chosen,
        **many,
        "1 control block": {"control_layers": 1},
        "every second block": {"control_stride": 2},
        "latent injection": {"injection": "latent"},
    }
    leak: dict[str, dict[str, Any]] = {
        "augmentation 0.5": {"control_augmentation": 0.5},
        "augmentation 1": {"control_augmentation": 1.0},
        **{f"{number} directions": _directions(number) for number in DIRECTIONS},
    }
    ordinary, no_cg, half, longer = "cg 0.2", "cg 0", "cg 0.5", f"cg 0.2, {LONG_STEPS} steps"
    shares: dict[str, dict[str, Any]] = {f"cg {ratio:g}": {"cg_ratio": ratio} for ratio in RATIOS}
    steps = ("max_train_steps", "checkpointing_steps", "validation_steps", "sample_steps")
    long = shares[ordinary] | dict.fromkeys(steps, LONG_STEPS)
    # {name: (extractor, baseline, remedies)}. Pixels of a place in two looks hardly agree: with some seeds a fit is
    # refused unless the number is given. A direction that tells the look alone is of no use to a run without CG.
    leaks = {
        "leak: pixel features": (PIXELS, no_cg, leak | many),
        "leak: early features": (EARLY, no_cg, leak | many | chosen),
        "leak: look direction": (LOOK, ordinary, leak | chosen),
    }
    return [
        *(StudyRun(name, options, None if name == ordinary else ordinary) for name, options in shares.items()),
        *(StudyRun(f"{half}, {name}", shares[half] | options, half) for name, options in half_cg.items()),
        *(StudyRun(f"{ordinary}, {name}", shares[ordinary] | options, ordinary) for name, options in fifth_cg.items()),
        StudyRun(longer, long, ordinary),
        *(StudyRun(f"{longer}, {name}", long | options, longer) for name, options in chosen.items()),
        *(StudyRun(name, shares[base], base, dinov3=dinov3) for name, (dinov3, base, _) in leaks.items()),
        *(
            StudyRun(f"{name}, {remedy}", shares[base] | options, name, dinov3=dinov3)
            for name, (dinov3, base, remedies) in leaks.items()
            for remedy, options in remedies.items()
        ),
        *(StudyRun(f"{name}, no phase 1", options, name, adapted=False) for name, options in shares.items()),
        *(StudyRun(f"{name}, named in captions", shares[name], name, named_cg=True) for name in (half, "cg 1")),
        # A probe of CG alone is left out: nobody trains on it.
        *(
            StudyRun(f"probe {name}", options | {"max_train_steps": PROBE_STEPS}, name)
            for name, options in shares.items()
            if options["cg_ratio"] < 1
        ),
    ]


def _directions(number):
    return {"control_projection": "fit", "control_directions": number}


def select_runs(runs: Sequence[StudyRun], texts: Sequence[str] | None) -> list[StudyRun]:
    """Return the settings that --only names.

    Args:
        runs: to choose from.
        texts: each the whole name of a setting, which selects it alone, or a part of names; None for all settings.

    Raises:
        InputError: a text is in no name.
    """
    if texts is None:
        return list(runs)
    selected: set[str] = set()
    for text in texts:
        names = [run.name for run in runs if text == run.name] or [run.name for run in runs if text in run.name]
        if not names:
            known = "; ".join(run.name for run in runs)
            raise InputError(f"--only {text}: in the name of no setting; give a part of one of these: {known}")
        selected.update(names)
    return [run for run in runs if run.name in selected]


# -------------------------------------------------------------------------------------------------------- preparation


def prepare(out: Path):
    """Write the toy, its CG pairs with both kinds of captions, and the leaking extractors into the study's folder.

    Raises:
        InputError: the toy cannot be written.
    """
    _run(out / "logs/toy.log", ["python", "-m", "c2r.toy", "--output_dir", str(out / "toy")])
    pairs = out / "toy/data/cg"
    shutil.copytree(pairs, out / NAMED_CG, ignore=shutil.ignore_patterns(".c2r_cache"), dirs_exist_ok=True)
    caption_cg(out / NAMED_CG, "cg")
    caption_cg(pairs, "real")
    write_leaking_extractors(out)


def write_leaking_extractors(out: Path):
    """Write the extractors with a planted leak beside the toy, unless they are there."""
    if not (out / PIXELS).exists():
        write_pixel_dinov3(out / PIXELS)
    if not (out / EARLY).exists():
        write_early_dinov3(out / EARLY, out / "toy/dinov3")
    if not (out / LOOK).exists():
        write_look_dinov3(out / LOOK, out / "toy/dinov3")


def caption_cg(dataset: Path, look: str):
    """Replace the captions of CG pairs.

    The toy's own say "cg render". A model can use these words to keep the two looks apart, so most of the study uses
    captions in the style of real clips: with the others it would see little effect of the share of CG.

    Args:
        dataset: folder with train/ and validation/.
        look: of `city.LOOKS`, as `city.caption` takes it.
    """
    for path in sorted(dataset.glob("*/metadata.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            seed = int(row["file_name"].partition("_")[0])
            row["text"] = city.caption(city.make_scene(seed), look)
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


# ----------------------------------------------------------------------------------------------------------- training


def run_phase1(out: Path, seed: int):
    """Train phase 1 with a seed, unless an earlier start of the study has done so.

    Raises:
        InputError: the training failed.
    """
    folder = out / f"phase1-{seed}"
    if not _is_finished(folder):
        options = ["--config", str(out / "toy/phase1.yaml"), "--seed", str(seed), "--output_dir", str(folder)]
        _train(PHASE1, out / f"logs/phase1-{seed}.log", options)


def run_folder(out: Path, run: StudyRun, seed: int) -> Path:
    """Return the folder of one run of phase 2."""
    return out / "runs" / f"{run.name.replace(':', '').replace(',', '').replace(' ', '-')}-{seed}"


def run_phase2(out: Path, run: StudyRun, seed: int) -> Result:
    """Train one setting of phase 2, unless an earlier start of the study has done so, and measure it.

    Raises:
        InputError: the training failed.
    """
    started = time.time()
    folder = run_folder(out, run, seed)
    if not _is_finished(folder):
        config = out / "configs" / f"{folder.name}.yaml"
        config.parent.mkdir(exist_ok=True)
        config.write_text(yaml.safe_dump(_phase2_options(out, run, seed), sort_keys=False))
        options = ["--config", str(config), "--seed", str(seed), "--output_dir", str(folder)]
        _train(PHASE2, out / f"logs/{folder.name}.log", options)
    measured = read_contract(folder / "final").metrics
    steps = (OPTIONS | run.options)["max_train_steps"]
    measured |= measure_layout(out / "toy", folder / f"samples/step-{steps}")
    values = {measure: measured.get(measure) for measure in MEASURES}
    return Result(run.name, seed, values, seconds=round(time.time() - started))


def _phase2_options(out, run, seed):
    options = yaml.safe_load((out / "toy/phase2.yaml").read_text()) | OPTIONS | run.options
    options["resume_backbone_from"] = str(out / (f"phase1-{seed}/best" if run.adapted else "toy/model"))
    if run.dinov3 is not None:
        options["dinov3"] = str(out / run.dinov3)
    if run.named_cg:
        options["cg_dataset"] = str(out / NAMED_CG)
    return options


def _is_finished(folder):
    return (folder / "final/c2r.json").exists()


def _train(script, log, options):
    # Port 0 is any free one: several trainings run at a time.
    _run(log, [*LAUNCH, "--main_process_port", "0", str(script), *options, "--resume_from_checkpoint", "latest"])


def _run(log, command):
    """Run one command on one core, its output in a file.

    Raises:
        InputError: it failed.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        status = run_command(command, output, OMP_NUM_THREADS="1")
    if status != 0:
        raise InputError(f"{log}: its command ended with exit status {status}; fix what it names and restart")


# -------------------------------------------------------------------------------------------------------- measurement


def measure_layout(toy_dir: Path, samples: Path) -> dict[str, float]:
    """Compare people and edges in sample videos with the scenes that they should show.

    Args:
        toy_dir: the toy's folder; its first test scenes are those of the samples.
        samples: folder with one row of videos, `SAMPLE_COLUMNS` side by side, for each scene.

    Returns:
        the first four of `MEASURES`.
    """
    toy = read_toy(toy_dir)
    rows = [_read_row(samples / f"{number}.mp4", toy) for number in range(OPTIONS["num_samples"])]
    generated, truth = ([row[name] for row in rows] for name in ("with control", "truth"))
    scenes = [city.make_scene(scene["seed"]) for scene in toy["test"][: len(rows)]]
    people_own, people_other = people_correlations(scenes, generated, toy["fps"])
    edges_own, edges_other = correlations(_edge_maps(generated), _edge_maps(truth))
    return {
        "people_own": people_own,
        "people_other": people_other,
        "edges_own": edges_own,
        "edges_other": edges_other,
    }


def _read_row(path: Path, toy: Toy) -> dict[str, torch.Tensor]:
    """Return {column: (F, 3, H, W) float in [0, 255]} of a sample video."""
    row = read_window(path, 0.0, toy["num_frames"], toy["fps"], toy["height"], len(SAMPLE_COLUMNS) * toy["width"])
    return dict(zip(SAMPLE_COLUMNS, row.float().chunk(len(SAMPLE_COLUMNS), dim=-1)))


def _edge_maps(clips: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    return [edge_map(clip) for clip in clips]
