"""The command line of a run as it was typed, and the commands to type next."""

import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

from c2r.options import PHASE2
from c2r.options.shared import clip_option_words

RESUME = ["--resume_from_checkpoint", "latest"]

#: Options of a phase 1 that are kept for phase 2, besides those of the clips.
_SHARED_OPTIONS = ("flow_shift", "mixed_precision", "optimizer", "report_to")


def launch_command(parent: list[str] | None = None) -> list[str]:
    """Return the words that started this process: those of its launcher, if there is one, or python's.

    Args:
        parent: the words of the parent process; None: read from Linux's /proc.
    """
    script, *words = sys.argv
    parent = _command_of(os.getppid()) if parent is None else parent
    # The launcher's words end in the script and its options: `accelerate launch --config_file … train_phase1.py …`.
    for position, word in enumerate(parent):
        if position > 1 and Path(word).name == Path(script).name and parent[position + 1 :] == words:
            launcher = _without_wrappers(parent[:position])
            if len(launcher) < 2:  # python alone
                break
            if Path(launcher[0]).name.startswith("python") and Path(launcher[1]).name in ("accelerate", "torchrun"):
                launcher = [Path(launcher[1]).name, *launcher[2:]]  # the script that pip has installed
            elif Path(launcher[0]).name.startswith("python"):
                launcher = ["python", *launcher[1:]]
            if not Path(launcher[0]).name.endswith("sh"):
                return [*launcher, word, *words]
    return ["python", script, *words]


def _without_wrappers(words):
    """Drop what stands before the interpreter or the launcher, such as `timeout 500` or `nice`."""
    names = ("python", "accelerate", "torchrun", "deepspeed")
    return words[next((i for i, word in enumerate(words) if Path(word).name.startswith(names)), 0) :]


def _command_of(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode(errors="surrogateescape").split("\0")[:-1]
    except OSError:  # not Linux, or the launcher is another user's
        return []


def resume_command(command: list[str], args: Namespace) -> str:
    """Return the line that continues a run.

    Args:
        command: the words that started it.
        args: its options.
    """
    return shlex.join(command if args.resume_from_checkpoint == "latest" else [*_without_resume(command), *RESUME])


def _without_resume(command):
    """Drop an earlier `--resume_from_checkpoint checkpoint-N`."""
    kept = []
    words = iter(command)
    for word in words:
        if word == RESUME[0]:
            next(words, None)
        elif not word.startswith(f"{RESUME[0]}="):
            kept.append(word)
    return kept


def phase2_command(command: list[str], args: Namespace) -> str:
    """Return the line that starts phase 2 on the result of a phase 1.

    It takes phase2.yaml, if there is one beside a phase1.yaml.

    Args:
        command: the words that started phase 1.
        args: its options.
    """
    if not any(Path(word).name == "train_phase1.py" for word in command):  # called from another program
        command = ["accelerate", "launch", "train_phase1.py"]
    script = next(i for i, word in enumerate(command) if Path(word).name == "train_phase1.py")
    out = Path(os.path.abspath(args.output_dir))  # "." has no name and no parent
    words = [*command[:script], str(Path(command[script]).with_name("train_phase2.py"))]
    words += ["--resume_backbone_from", str(out / "best")]
    words += ["--real_dataset", *args.real_dataset, *clip_option_words(args)]
    for name in _SHARED_OPTIONS:
        value = getattr(args, name)
        if value != PHASE2.options[name].default:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    words += ["--output_dir", str(out.parent / "phase2")]
    config = Path(args.config or "")
    beside = config.with_name("phase2.yaml") if config.name == "phase1.yaml" else None
    words += ["--config", str(beside)] if beside and beside.exists() else ["--cg_dataset", "data/cg"]
    return shlex.join([*words, *RESUME])


def next_commands(command: list[str], args: Namespace) -> list[str]:
    """Return the lines to type after a run that has ended.

    Args:
        command: the words that started it.
        args: its options.
    """
    out = Path(args.output_dir)
    report = shlex.join(["python", "-m", "c2r.report", str(out), "--output", str(out / "report.html")])
    if not hasattr(args, "resume_backbone_from"):
        return [phase2_command(command, args), report]
    best = shlex.quote(str(out / "best"))
    generate = f'python -m c2r.generate --model {best} --control_video coarse.mp4 --prompt "…" --output out.mp4'
    return [generate, report]
