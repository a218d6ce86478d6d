"""Which choices bring control, and which bring the CG look? Many small runs of phase 2 on the toy city.

    python -m c2r.study

Each run is the command that a user would type, with its own monitor; what it has made is judged by measures that share
nothing with the models. Interrupted and run again, it goes on where it was. Results go to results.csv, a line per run,
and are drawn in control.png and remedies.png.
"""

import argparse
import csv
import io
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import yaml
from matplotlib.figure import Figure

from c2r import InputError
from c2r.cli import run
from c2r.data.video import read_window
from c2r.evaluation.samples import COLUMNS
from c2r.files import write_atomic
from c2r.toy import city
from c2r.toy.layout import correlations, edge_map, people_correlations
from c2r.toy.pixel_dinov3 import write_pixel_dinov3

ROOT = Path(__file__).resolve().parents[1]
RATIOS = (0.0, 0.1, 0.2, 0.5, 1.0)
#: Of every run; what differs is in `planned_runs`.
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
FIGURES = (
    "people_own",
    "people_other",
    "edges_own",
    "edges_other",
    "loss",
    "loss_real",
    "control_gain",
    "prompt_gain",
    "leak_share_coarse",
    "leak_share_augmented",
    "cg_look",
    "cg_look_low",
    "cg_look_high",
    "cg_texture",
    "cg_lighting",
    "cg_geometry",
    "cg_dinov3",
    "cg_share",
)


def planned_runs():
    """{name: options of phase 2}; `backbone` and `dinov3` name what takes the place of the usual ones."""
    runs = {f"cg {ratio:g}": {"cg_ratio": ratio} for ratio in RATIOS}
    runs |= {
        # From 0.5 down: it samples often, and heeds the first warning.
        "cg 0.5, controller": {
            "cg_ratio": 0.5,
            "cg_ratio_min": 0.05,
            "monitor_bound": 0.15,
            "monitor_patience": 1,
            "sample_steps": 20,
        },
        "cg 0.5, real weight 4": {"cg_ratio": 0.5, "real_weight": 4.0},
        "cg 0.5, adversarial 0.1": {"cg_ratio": 0.5, "adversarial_weight": 0.1},
        "cg 0.2, augmentation 0.5": {"cg_ratio": 0.2, "control_augmentation": 0.5},
        "leak: pixel features": {"cg_ratio": 0.0, "dinov3": "pixel_dinov3"},
        "leak: pixel features, augmentation 0.5": {
            "cg_ratio": 0.0,
            "dinov3": "pixel_dinov3",
            "control_augmentation": 0.5,
        },
    }
    runs |= {f"cg {ratio:g}, no phase 1": {"cg_ratio": ratio, "backbone": "base"} for ratio in RATIOS}
    runs |= {
        "cg 0.2, 1 control block": {"cg_ratio": 0.2, "control_layers": 1},
        "cg 0.2, every second block": {"cg_ratio": 0.2, "control_stride": 2},
    }
    return runs


def caption_like_real(folder):
    """Have the CG pairs' captions tell of weather, as those of the real clips do, and not of rendering.

    The toy says "cg render" in them, and a model that is told so keeps the look apart by itself. Captioners do not.
    """
    for path in sorted(folder.glob("*/metadata.csv")):
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            row["text"] = city.caption(city.make_scene(int(row["file_name"].partition("_")[0])))
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def launch(log, *command):
    """Run one command on one core, its output in a file.

    Raises:
        InputError: it failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a") as output:
        code = subprocess.run(
            [sys.executable, *map(str, command)], stdout=output, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code != 0:
        raise InputError(f"{log}: its command ended with exit status {code}; mend it and start again")


def train(script, log, *options):
    cpu = ROOT / "accelerate_configs/cpu.yaml"
    launcher = ["-m", "accelerate.commands.launch", "--config_file", cpu, "--main_process_port", "0"]
    launch(log, *launcher, ROOT / script, *options, "--resume_from_checkpoint", "latest")


def adapt(out, seed):
    """Phase 1 of a seed, unless it is there."""
    folder = out / f"phase1-{seed}"
    if not (folder / "final/c2r.json").exists():
        options = ["--config", out / "toy/phase1.yaml", "--seed", seed, "--output_dir", folder]
        train("train_phase1.py", out / f"logs/phase1-{seed}.log", *options)


def ground(out, name, options, seed):
    """Phase 2 of one run, unless it is there; returns its line of results.csv."""
    folder = out / "runs" / f"{name.replace(':', '').replace(',', '').replace(' ', '-')}-{seed}"
    started = time.time()
    if not (folder / "final/c2r.json").exists():
        config = yaml.safe_load((out / "toy/phase2.yaml").read_text()) | OPTIONS | options
        base = config.pop("backbone", None) == "base"
        config["resume_backbone_from"] = str(out / ("toy/model" if base else f"phase1-{seed}/best"))
        if options.get("dinov3"):
            config["dinov3"] = str(out / options["dinov3"])
        path = out / "configs" / f"{folder.name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(config, sort_keys=False))
        log = out / f"logs/{folder.name}.log"
        train("train_phase2.py", log, "--config", path, "--seed", seed, "--output_dir", folder)
    metrics = json.loads((folder / "final/c2r.json").read_text())["metrics"]
    figures = metrics | layout_figures(out, folder / f"samples/step-{OPTIONS['max_train_steps']}")
    line = {"run": name, "seed": seed} | {figure: figures.get(figure) for figure in FIGURES}
    return line | {"seconds": round(time.time() - started)}


def layout_figures(out, samples):
    """How well the people and the edges of the sample videos stand where their scenes have them."""
    toy = json.loads((out / "toy/toy.json").read_text())
    scenes = toy["test"][: OPTIONS["num_samples"]]
    clips = {name: [] for name in COLUMNS}
    for number in range(len(scenes)):
        size = (toy["num_frames"], toy["fps"], toy["height"], len(COLUMNS) * toy["width"])
        row = torch.as_tensor(read_window(samples / f"{number}.mp4", 0.0, *size)).float()
        for name, clip in zip(COLUMNS, row.chunk(len(COLUMNS), dim=-1)):
            clips[name].append(clip)
    worlds = [city.make_scene(scene["seed"]) for scene in scenes]
    people = people_correlations(worlds, clips["with control"], toy["fps"])
    edges = correlations(*([edge_map(clip) for clip in clips[name]] for name in ("with control", "truth")))
    return dict(zip(("people_own", "people_other", "edges_own", "edges_other"), (*people, *edges)))


def write_results(path, lines):
    table = io.StringIO()
    writer = csv.DictWriter(table, ["run", "seed", *FIGURES, "seconds"], lineterminator="\n")
    writer.writeheader()
    for line in lines:
        writer.writerow({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in line.items()})
    write_atomic(path, table.getvalue().encode())


def read_results(path):
    """results.csv as a list of dicts; empty if there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return [
            {
                k: v if k == "run" else int(v) if k in ("seed", "seconds") else float(v) if v else None
                for k, v in r.items()
            }
            for r in csv.DictReader(file)
        ]


# ------------------------------------------------------------------------------------------------------------- plots


def of_run(lines, name, figure):
    """A figure of all seeds of a run."""
    return [line[figure] for line in lines if line["run"] == name and line[figure] is not None]


def draw_control(lines, path):
    """Control and CG look over the share of CG, with and without phase 1."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = {
        "people_own": "people correlation, own scene",
        "control_gain": "control gain",
        "cg_look": "CG look (0 real clips, 1 CG clips)",
    }
    for axes, (key, title) in zip(figure.subplots(1, len(panels)), panels.items()):
        for suffix, label, colour in (("", "with phase 1", "C0"), (", no phase 1", "without", "C1")):
            points = [(ratio, of_run(lines, f"cg {ratio:g}{suffix}", key)) for ratio in RATIOS]
            points = [(ratio, values) for ratio, values in points if values]
            if not points:
                continue
            means = [sum(values) / len(values) for _, values in points]
            axes.plot([ratio for ratio, _ in points], means, color=colour, label=label)
            for ratio, values in points:
                axes.plot([ratio] * len(values), values, ".", color=colour)
        axes.set(title=title, xlabel="share of CG")
        axes.grid(alpha=0.3)
    figure.axes[0].legend()
    _save(figure, path)


def draw_remedies(lines, path):
    """Every run by its CG look and its control: towards the upper left is better."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    names = [name for name in planned_runs() if of_run(lines, name, "cg_look")]
    markers = "os^vD<>ph*XPd"
    for i, name in enumerate(name for name in names if "no phase 1" not in name):
        look, control = of_run(lines, name, "cg_look"), of_run(lines, name, "control_gain")
        axes.plot(look, control, markers[i % len(markers)], color=f"C{i % 10}", label=name, alpha=0.8)
    axes.set(xlabel="CG look (0 real clips, 1 CG clips)", ylabel="control gain")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5))
    _save(figure, path)


def _save(figure, path):
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    write_atomic(path, file.getvalue())


def print_table(lines):
    shown = ("people_own", "people_other", "edges_own", "control_gain", "leak_share_coarse", "cg_look", "cg_share")
    print(f"{'mean over seeds':36s} seeds " + " ".join(f"{name:>12s}" for name in shown))
    for name in planned_runs():
        count = len(of_run(lines, name, "loss"))
        if count:
            values = [of_run(lines, name, figure) for figure in shown]
            means = [f"{sum(v) / len(v):12.3f}" if v else " " * 12 for v in values]
            print(f"{name:36s} {count:5d} " + " ".join(means))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="study")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time, a core each")
    args = parser.parse_args()
    out = Path(args.output_dir)
    launch(out / "logs/toy.log", "-m", "c2r.toy", "--output_dir", out / "toy")
    caption_like_real(out / "toy/data/cg")
    if not (out / "pixel_dinov3").exists():
        write_pixel_dinov3(out / "pixel_dinov3")
    results = out / "results.csv"
    lines = read_results(results)
    known = {(line["run"], line["seed"]) for line in lines}
    adapt(out, 0)  # alone: it encodes the clips for all
    with ThreadPoolExecutor(args.workers) as pool:
        list(pool.map(lambda seed: adapt(out, seed), range(1, args.seeds)))
        jobs = [(name, options, seed) for name, options in planned_runs().items() for seed in range(args.seeds)]
        jobs = [job for job in jobs if (job[0], job[2]) not in known]
        for line in pool.map(lambda job: ground(out, *job), jobs):
            lines.append(line)
            write_results(results, lines)
            print(f"{line['run']}, seed {line['seed']}: {line['seconds']} s", flush=True)
    draw_control(lines, out / "control.png")
    draw_remedies(lines, out / "remedies.png")
    print_table(lines)


if __name__ == "__main__":
    run(main)
