"""Effect of the control adapter's window in time on the toy city: does a video keep time with its control?

    OMP_NUM_THREADS=1 python -m benchmarks.control_timing --work_dir FOLDER

Trains phase 2 in 100 steps from the same phase 1 with each of three adapters and three seeds, and generates scenes in
which every walker crosses the view:

    nine frames  the convolution over time starts as the mean of nine frames, as the released C2R's does
    own group    it starts as the mean of the frames that the VAE encodes in the same latent frame
    causal       the same, and it ends at the last of these frames: --causal_control

Prints the people correlation at the first frame and over all frames, the timing error and the control gain. The timing
error is the number of frames by which the true scene must be advanced for its walkers to agree best with the generated
ones: positive if the video runs ahead of its control. It is given for the frames of each latent frame.

Takes 2 to 3 CPU minutes a run, and as long as the quickstart's phase 1 before. What the folder holds already is not
made again.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from c2r import InputError, cli
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.models.backbone import load_transformer
from c2r.models.contract import read_contract
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import read_dinov3_config
from c2r.toy import city
from c2r.toy.commands import LAUNCH, PHASE1, PHASE2, run_command
from c2r.toy.folder import FPS, HEIGHT, NUM_FRAMES, WIDTH
from c2r.toy.layout import WEIGHTS, PeopleFinder, correlation, people_map

FIRST_SEED, NUM_SCENES = 4_000_000, 12
#: Slowest walker of the scenes in m/s: those who stand still have no timing.
SLOWEST = 0.6
#: Frames by which the true scene is advanced.
SHIFTS = np.arange(-4, 4.01, 0.5)
#: The pixel frames of each latent frame of Wan's VAE.
GROUPS = {"frame 0": slice(0, 1), "frames 1-4": slice(1, 5), "frames 5-8": slice(5, 9), "all": slice(0, NUM_FRAMES)}
#: Options of every run, over those of the toy's phase2.yaml.
OPTIONS = {
    "max_train_steps": 100,
    "checkpointing_steps": 100,
    "checkpoints_total_limit": 1,
    "validation_steps": 100,
    "num_samples": 0,
    "cache_control_features": True,
    "report_to": ["none"],
}
SAMPLING = ("--num_inference_steps=12", "--guidance=cfg", "--guidance_scale=2", "--control_guidance_scale=3")


@dataclass(frozen=True)
class Variant:
    """An adapter that is tried."""

    name: str
    mean_of_nine: bool = False
    options: dict[str, Any] = field(default_factory=dict)  #: of phase 2, over `OPTIONS`


VARIANTS = (
    Variant("nine frames", mean_of_nine=True),
    Variant("own group"),
    Variant("causal", options={"causal_control": True}),
)


# ------------------------------------------------------------------------------------------------------------- scenes


def crossing_scenes(count: int) -> dict[int, city.Scene]:
    """Return the first scenes whose walkers all cross the view: {seed: scene}."""
    scenes: dict[int, city.Scene] = {}
    seed = FIRST_SEED
    while len(scenes) < count:
        scene = city.make_scene(seed)
        if all(abs(person.vx) > SLOWEST for person in scene.people):
            scenes[seed] = scene
        seed += 1
    return scenes


def advanced(scene: city.Scene, seconds: float) -> city.Scene:
    """Return a scene as it is some seconds later, negative for earlier."""
    people = [
        replace(p, x=p.x + p.vx * seconds, z=p.z + p.vz * seconds, phase=p.phase + 7 * seconds) for p in scene.people
    ]
    camera, yaw = scene.camera + scene.velocity * seconds, scene.yaw + scene.yaw_rate * seconds
    return replace(scene, people=people, camera=camera, yaw=yaw)


def true_people(scene: city.Scene) -> torch.Tensor:
    """Return the share of each cell that shows a person, (F, h, w)."""
    kinds = city.render(scene, (), NUM_FRAMES, FPS, HEIGHT, WIDTH)["kinds"]
    return F.avg_pool2d(torch.from_numpy(kinds == city.PERSON).float()[:, None], PeopleFinder.cell)[:, 0]


# -------------------------------------------------------------------------------------------------------------- timing


def shift_correlations(
    found: Sequence[torch.Tensor], truths: Sequence[Sequence[torch.Tensor]], frames: slice
) -> list[float]:
    """Return the mean correlation of the scenes' people with the truth of each shift.

    Args:
        found: (F, h, w) for each scene.
        truths: (F, h, w) for each shift of each scene.
        frames: those that are compared.
    """
    return [
        fmean(correlation(found_map[frames], truth[frames]) for found_map, truth in zip(found, truths_of_shift))
        for truths_of_shift in zip(*truths)
    ]


def peak(shifts: np.ndarray, values: Sequence[float]) -> float:
    """Return the shift with the highest value, between the given ones by the parabola through three of them."""
    best = int(np.argmax(values))
    if best in (0, len(values) - 1):
        return float(shifts[best])
    left, middle, right = values[best - 1 : best + 2]
    offset = 0.5 * (left - right) / (left - 2 * middle + right)
    return float(shifts[best] + offset * (shifts[1] - shifts[0]))


def measure(found: Sequence[torch.Tensor], truths: Sequence[Sequence[torch.Tensor]]) -> dict[str, float]:
    """Return people correlation and timing error of the videos: first frame, all frames, and each latent frame."""
    measures: dict[str, float] = {}
    for name, frames in GROUPS.items():
        values = shift_correlations(found, truths, frames)
        measures[f"people, {name}"] = values[SHIFTS.tolist().index(0.0)]
        measures[f"timing, {name}"] = peak(SHIFTS, values)
    return measures


# ---------------------------------------------------------------------------------------------------------------- runs


def prepare(out: Path):
    """Write the toy, the phase 1 that all runs start from, and the coarse videos."""
    _run(out / "logs/toy.log", ["python", "-m", "c2r.toy", "--output_dir", str(out / "toy")], out / "toy/toy.json")
    options = ["--config", str(out / "toy/phase1.yaml"), "--output_dir", str(out / "phase1")]
    train = [*LAUNCH, "--main_process_port", "0", str(PHASE1), *options, "--resume_from_checkpoint", "latest"]
    _run(out / "logs/phase1.log", train, out / "phase1/final/c2r.json")
    for seed, scene in crossing_scenes(NUM_SCENES).items():
        clips = city.render(scene, ("coarse", "real"), NUM_FRAMES, FPS, HEIGHT, WIDTH)
        for look, frames in clips.items():
            if look != "kinds":
                write_video(out / f"scenes/{seed}_{look}.mp4", frames, FPS)


def run(out: Path, variant: Variant, seed: int) -> Path:
    """Train a variant with a seed and generate all scenes; return the path that the videos' names begin with."""
    name = f"{variant.name.replace(' ', '-')}-{seed}"
    folder = out / "runs" / name
    paths = {
        "pretrained_model_name_or_path": out / "toy/model",
        "real_dataset": out / "toy/data/real",
        "cg_dataset": out / "toy/data/cg",
        "dinov3": out / "toy/dinov3",
        "resume_backbone_from": out / "phase1/best",
        "output_dir": folder,
    }
    options = yaml.safe_load((out / "toy/phase2.yaml").read_text()) | OPTIONS | variant.options
    options |= {name: str(path) for name, path in paths.items()} | {"seed": seed}
    del options["sample_dataset"]
    if variant.mean_of_nine:
        start = out / "starts" / name
        save_mean_of_nine(start, out / "phase1/best", out / "toy/dinov3", options["control_layers"], seed)
        options["resume_controlnet_from"] = str(start)
    config = out / f"configs/{name}.yaml"
    config.parent.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(options, sort_keys=False))
    train = [*LAUNCH, "--main_process_port", "0", str(PHASE2), "--config", str(config)]
    log = out / f"logs/{name}.log"
    _run(log, [*train, "--resume_from_checkpoint", "latest"], folder / "final/c2r.json")

    videos, scenes = out / f"videos/{name}", crossing_scenes(NUM_SCENES)
    generate = ["python", "-m", "c2r.generate", "--model", str(folder / "final"), *SAMPLING, "--seed=0"]
    for number, scene in scenes.items():
        generate += [f"--prompt={city.caption(scene)}", f"--control_video={out}/scenes/{number}_coarse.mp4"]
    _run(log, [*generate, "--output", f"{videos}.mp4"], Path(f"{videos}-{len(scenes) - 1}.mp4"))
    return videos


def save_mean_of_nine(folder: Path, backbone: Path, dinov3: Path, control_layers: int, seed: int):
    """Save the start weights of phase 2 with this seed, but with the mean of nine frames as convolution."""
    torch.manual_seed(seed)
    width = read_dinov3_config(dinov3)["hidden_size"]
    controlnet = C2RControlNet.from_transformer(load_transformer(backbone), control_layers, feature_dim=width)
    kernel = controlnet.control_adapter.temporal_downsample.conv.weight
    nn.init.constant_(kernel, 1 / kernel.shape[2])
    controlnet.save_pretrained(folder)


def _run(log, command, done):
    """Run a command, its output in a file, unless the file `done` shows that it has been run."""
    if done.exists():
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        status = run_command(command, output, OMP_NUM_THREADS="1")
    if status != 0:
        raise InputError(f"{log}: its command ended with exit status {status}; fix what it names and restart")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    out = args.work_dir.absolute()
    prepare(out)
    scenes = crossing_scenes(NUM_SCENES)
    truths = [[true_people(advanced(scene, shift / FPS)) for shift in SHIFTS] for scene in scenes.values()]
    finder = PeopleFinder.from_pretrained(WEIGHTS / "people_finder", torch_dtype=torch.float32)

    def found(path):
        frames = read_window(path, 0.0, NUM_FRAMES, FPS, HEIGHT, WIDTH).float()
        return people_map(finder, frames / 127.5 - 1)

    results = {"true videos": [measure([found(out / f"scenes/{seed}_real.mp4") for seed in scenes], truths)]}
    for seed in args.seeds:
        for variant in VARIANTS:
            videos = run(out, variant, seed)
            measures = measure([found(f"{videos}-{i}.mp4") for i in range(len(scenes))], truths)
            measures["control gain"] = read_contract(out / "runs" / videos.name / "final").metrics["control_gain"]
            results.setdefault(variant.name, []).append(measures)
            print(variant.name, seed, {name: round(value, 4) for name, value in measures.items()}, flush=True)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)


def print_table(results: dict[str, list[dict[str, float]]]):
    """Print the mean over the seeds of each measure, and their range."""
    measures = list(dict.fromkeys(name for runs in results.values() for name in runs[0]))
    for name in measures:
        print(name)
        for variant, runs in results.items():
            if name in runs[0]:
                values = [run[name] for run in runs]
                print(f"  {variant:12s} {fmean(values):7.3f}  ({min(values):.3f} to {max(values):.3f})")


if __name__ == "__main__":
    cli.run(main)
