"""Run both phases on the toy city and turn coarse videos into real-looking ones, on a CPU and without downloads.

    python -m c2r.quickstart

Each step prints and runs a command that a user could type. An interrupted quickstart continues where it was when it is
started again. It ends with report.png, report.webp and a table, which report.json holds too.
"""

import shlex
import time
from argparse import Namespace
from collections.abc import Iterable
from pathlib import Path

from c2r import InputError, cli, options
from c2r.toy.commands import LAUNCH, PHASE1, PHASE2, require_clone, run_command

RESUME = ["--resume_from_checkpoint", "latest"]
# Options of phase 2's samples and of c2r.generate. Phase 1 has no samples, so its contract names no guidance.
STEPS, GUIDANCE = ("num_inference_steps",), ("guidance", "guidance_scale")


def main(argv: list[str] | None = None):
    args = cli.parse(options.QUICKSTART, argv)
    require_clone()
    started = time.time()
    out = Path(args.output_dir)
    toy_dir, phase1, phase2 = out / "toy", out / "outputs/phase1", out / "outputs/phase2"

    run_step("toy data", ["python", "-m", "c2r.toy", "--output_dir", str(toy_dir)], toy_dir / "toy.json")
    from c2r.toy.city import caption
    from c2r.toy.folder import read_toy

    toy = read_toy(toy_dir)

    size = [f"--{name}={toy[name]}" for name in ("height", "width", "num_frames", "fps")]
    # Both are done if phase 1 has a best/: it starts after them.
    for domain in ("real", "cg"):
        encode = ["-m", "c2r.encode", "--dataset", str(toy_dir / "data" / domain), "--domain", domain, *size]
        encode += ["--pretrained_model_name_or_path", str(toy_dir / "model"), "--dataloader_num_workers", "0"]
        run_step(f"encode the {domain} clips", [*LAUNCH, *encode], phase1 / "best/c2r.json")

    config = ["--config", str(toy_dir / "phase1.yaml"), "--output_dir", str(phase1)]
    run_step(
        "phase 1: adapt the backbone to real video",
        [*LAUNCH, str(PHASE1), *config, *RESUME],
        phase1 / "final/c2r.json",
    )
    config = ["--config", str(toy_dir / "phase2.yaml"), "--output_dir", str(phase2)]
    config += ["--resume_backbone_from", str(phase1 / "best")]
    run_step("phase 2: ground the control", [*LAUNCH, str(PHASE2), *config, *RESUME], phase2 / "final/c2r.json")
    trained = cli.parse(options.PHASE2, config)

    from c2r.toy.report import scenes_under_other_prompts, write_report

    prompts = [scene["prompt"] for scene in toy["test"]]
    controls = [scene["control_video"] for scene in toy["test"]]
    other_prompts = [caption(scene) for scene in scenes_under_other_prompts(toy)]
    videos = {}
    same_control = controls[:1] * len(other_prompts)
    for title, name, model, texts, coarse in (
        ("generate without control", "before", phase1 / "best", prompts, []),
        ("generate with control", "generated", phase2 / "best", prompts, controls),
        ("the first scene under other prompts", "other prompts", phase2 / "best", other_prompts, same_control),
    ):
        path = out / f"videos/{name.replace(' ', '-')}.mp4"
        videos[name] = [path.with_stem(f"{path.stem}-{i}") for i in range(len(texts))]
        generate = [
            "python",
            "-m",
            "c2r.generate",
            "--model",
            str(model),
            *given(STEPS if coarse else STEPS + GUIDANCE, trained),
            "--seed=0",
        ]
        generate += [f"--prompt={text}" for text in texts] + [f"--control_video={video}" for video in coarse]
        run_step(title, [*generate, "--output", str(path)], videos[name][-1])

    print("\n== report", flush=True)
    for name, value in write_report(out, toy_dir, phase1, phase2, videos).items():
        print(f"{name:60s} {value:8.4f}")
    shown = f"{out / 'report.png'} and {out / 'report.webp'}"
    print(f"\n{shown} show the clips; the quickstart took {time.time() - started:.0f} s")
    page = ["python", "-m", "c2r.report", str(phase1), str(phase2), "--output", str(out / "report.html")]
    print(f"next: {shlex.join(page)}")
    print("      README.md, Use your own data")


def given(names: Iterable[str], args: Namespace) -> list[str]:
    """Return options of a command as another command's line has them."""
    return [f"--{name}={getattr(args, name)}" for name in names]


def run_step(title: str, command: list[str], done: Path):
    """Print a command and run it, unless the file `done` shows that an earlier start completed the step.

    Raises:
        InputError: the command failed.
    """
    print(f"\n== {title}\n$ {shlex.join(command)}", flush=True)
    if done.exists():
        print("done already", flush=True)
        return
    started = time.time()
    status = run_command(command)
    if status != 0:
        raise InputError(
            f"step '{title}': ended with exit status {status}; fix what its message above names and restart"
        )
    print(f"-- {title}: {time.time() - started:.0f} s", flush=True)


if __name__ == "__main__":
    cli.run(main)
