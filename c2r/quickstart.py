"""See the main job work, on a CPU and without downloads: both phases on the toy city, then coarse video to real.

    python -m c2r.quickstart

Every step runs the command that a user would type, and prints it. Interrupted and run again, it goes on where it was.
It ends with report.png and a table, also in report.json.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import torch

from c2r import InputError
from c2r.cli import run
from c2r.data.contact_sheet import draw_contact_sheet
from c2r.data.video import read_window
from c2r.toy import city
from c2r.toy.layout import people_correlations

ROOT = Path(__file__).resolve().parents[1]
SHOWN_SCENES = 5


def run_step(title, command, done):
    """Print and run one command, unless the file `done` shows that it has been completed before."""
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    if Path(done).exists():
        print("done already", flush=True)
        return
    # What a user types on the shell, run by the interpreter that runs us: the same virtual environment.
    if command[0] == "accelerate":
        command = [sys.executable, "-m", "accelerate.commands.launch", *command[2:]]
    elif command[0] == "python":
        command = [sys.executable, *command[1:]]
    started = time.time()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    code = subprocess.run(command, env=environment).returncode
    if code != 0:
        raise InputError(f"step '{title}' ended with exit status {code}; its message is above")
    print(f"-- {title}: {time.time() - started:.0f} s", flush=True)


def read_clip(toy, path):
    """(F, 3, H, W) float in [0, 255]: one of the toy's clips."""
    frames = read_window(path, 0.0, toy["num_frames"], toy["fps"], toy["height"], toy["width"])
    return torch.as_tensor(frames).float()


def draw_report(toy, columns, path):
    """Write the contact sheet of the first SHOWN_SCENES test scenes.

    Args:
        toy: the content of toy.json.
        columns: {title: one video path per test scene}.
        path: the PNG.
    """

    def frames(video):
        return read_clip(toy, video).to(torch.uint8).permute(0, 2, 3, 1).numpy()

    clips = {title: [frames(video) for video in videos[:SHOWN_SCENES]] for title, videos in columns.items()}
    draw_contact_sheet(clips, [scene["prompt"] for scene in toy["test"][:SHOWN_SCENES]]).save(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="quickstart")
    args = parser.parse_args()
    started = time.time()
    out = Path(args.output_dir)
    toy_dir, phase1, phase2 = out / "toy", out / "outputs/phase1", out / "outputs/phase2"
    launch = ["accelerate", "launch", "--config_file", str(ROOT / "accelerate_configs/cpu.yaml")]

    run_step("toy data", ["python", "-m", "c2r.toy", "--output_dir", str(toy_dir)], toy_dir / "toy.json")
    toy = json.loads((toy_dir / "toy.json").read_text())
    size = [f"--{name}={toy[name]}" for name in ("height", "width", "num_frames", "fps")]
    for domain in ("real", "cg"):
        encode = ["-m", "c2r.encode", "--dataset", str(toy_dir / "data" / domain), "--domain", domain, *size]
        encode += ["--pretrained_model_name_or_path", str(toy_dir / "model"), "--dataloader_num_workers", "0"]
        run_step(f"encode the {domain} clips", [*launch, *encode], phase1 / "best/c2r.json")
    config = ["--config", str(toy_dir / "phase1.yaml"), "--output_dir", str(phase1)]
    resume = ["--resume_from_checkpoint", "latest"]
    run_step(
        "phase 1: adapt the backbone to real video",
        [*launch, str(ROOT / "train_phase1.py"), *config, *resume],
        phase1 / "final/c2r.json",
    )
    config = ["--config", str(toy_dir / "phase2.yaml"), "--output_dir", str(phase2)]
    backbone = ["--resume_backbone_from", str(phase1 / "best")]
    run_step(
        "phase 2: ground the control",
        [*launch, str(ROOT / "train_phase2.py"), *config, *backbone, *resume],
        phase2 / "final/c2r.json",
    )
    prompts = [f"--prompt={scene['prompt']}" for scene in toy["test"]]
    controls = [f"--control_video={scene['control_video']}" for scene in toy["test"]]
    # Of the scales tried, these make the people plainest; see the report's people correlation.
    sampling = ["--num_inference_steps=20", "--guidance=cfg", "--guidance_scale=2", "--seed=0"]
    controls += ["--control_guidance_scale=3"]
    videos = {}
    for name, model, extra in (("before", phase1 / "best", []), ("generated", phase2 / "best", controls)):
        videos[name] = [out / f"videos/{name}-{i}.mp4" for i in range(len(prompts))]
        generate = ["python", "-m", "c2r.generate", "--model", str(model), *sampling, *prompts, *extra]
        run_step(
            f"generate with {model}",
            [*generate, "--output", str(out / f"videos/{name}.mp4")],
            videos[name][-1],
        )

    print("\n== report", flush=True)
    truths = [scene["truth"] for scene in toy["test"]]
    columns = {
        "coarse control": [scene["control_video"] for scene in toy["test"]],
        "before phase 2 (no control)": videos["before"],
        "generated": videos["generated"],
        "truth": truths,
    }
    draw_report(toy, columns, out / "report.png")

    def metrics_of(folder):
        return json.loads((folder / "c2r.json").read_text())["metrics"]

    adapted, grounded = metrics_of(phase1 / "best"), metrics_of(phase2 / "best")
    scenes = [city.make_scene(scene["seed"]) for scene in toy["test"]]
    people = {
        name: people_correlations(scenes, [read_clip(toy, path) for path in paths], toy["fps"])
        for name, paths in (*videos.items(), ("truth", truths))
    }
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
        "CG share of the samples in phase 2": metrics_of(phase2 / "final")["cg_share"],
    }
    (out / "report.json").write_text(json.dumps(table, indent=2) + "\n")
    for name, value in table.items():
        print(f"{name:52s} {value:8.4f}")
    print(f"\n{out / 'report.png'} shows the clips; the whole took {time.time() - started:.0f} s")


if __name__ == "__main__":
    run(main)
