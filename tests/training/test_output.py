"""The output of a run: no warnings of libraries, and at its end what lies where and what to type next."""

import re
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from c2r import cli
from c2r.options import PHASE1, PHASE2, REPORT
from c2r.training import run as run_module
from c2r.training.launched import launch_command, next_commands, phase2_command, resume_command
from tests.helpers.commands import phase1
from tests.helpers.forks import fork
from tests.helpers.options import options, phase2_options
from tests.helpers.runs import run_of

#: Lines that libraries print where a setting is missing, deprecated or guessed.
COMPLAINTS = re.compile(
    r"warn|deprecat|failed|unable|not passed|defaults? used|no longer|ignored|mismatch|too many workers|not supported"
    r"|please|you should|consider|traceback|\[W",
    re.IGNORECASE,
)


@pytest.mark.parametrize("phase", ["first", "second"])
def test_no_library_complains(phase, request):
    _, done = request.getfixturevalue(phase)
    lines = f"{done.stdout}\n{done.stderr}".replace("\r", "\n").splitlines()
    own = re.compile(r"warning: \S+ \(real\): 1 of 5 files lose more than 25% of their picture by cropping")
    assert [line for line in lines if COMPLAINTS.search(line) and not own.match(line)] == []


def test_a_log_file_gets_no_line_for_each_step(tiny_models, small_datasets, tmp_path):
    command = phase1(tiny_models, small_datasets, tmp_path, "--max_train_steps=8", launcher=())
    done = fork(*command, TQDM_MININTERVAL=None)
    assert done.returncode == 0
    assert len(re.findall(r"phase 1: +\d+%", done.stderr)) <= 3  # at the start, after a validation, at the end


def last_lines(done):
    """Return {name: content} of the block at the end of a run; a line without a name has the name before it."""
    block = done.stdout[done.stdout.index("final/ and best/ (") :].splitlines()[1:]
    names, found = "", {}
    for line in block:
        names = line[2:10].strip() or names
        found.setdefault(names, []).append(line[11:])
    return found


def test_phase_1_ends_with_the_command_of_phase_2(first):
    out, done = first
    found = last_lines(done)
    assert found["best"] == [f"{out}/best"]
    assert found["logs"] == [f"tensorboard --logdir {out}"]
    command, report = found["next"]
    assert shlex.split(command)[:3] == ["python", "-m", "accelerate.commands.launch"]
    words = shlex.split(command)
    args = cli.parse(PHASE2, words[words.index("train_phase2.py") + 1 :])
    assert (args.resume_backbone_from, args.height, args.mixed_precision) == (f"{out}/best", 32, "no")
    assert shlex.split(report)[:3] == ["python", "-m", "c2r.report"]
    assert cli.parse(REPORT, cli.name_first_words("runs", shlex.split(report)[3:])).runs == [str(out)]


def test_phase_2_ends_with_generation_and_the_report(second):
    out, done = second
    found = last_lines(done)
    assert found["samples"] == [f"{out}/samples"]
    generate, report = found["next"]
    assert generate.startswith(f"python -m c2r.generate --model {out}/best ")
    assert report == f"python -m c2r.report {out} --output {out}/report.html"


def test_the_launcher_is_part_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_phase1.py", "--output_dir", "out"])
    tail = ["train_phase1.py", "--output_dir", "out"]
    config = ["--config_file", "accelerate_configs/multi_gpu.yaml"]
    for parent, launcher in (
        (["/venv/bin/python3.11", "/venv/bin/accelerate", "launch", *config], ["accelerate", "launch", *config]),
        (["python3", "-m", "accelerate.commands.launch"], ["python", "-m", "accelerate.commands.launch"]),
        (["/venv/bin/python", "/venv/bin/torchrun", "--nproc_per_node=2"], ["torchrun", "--nproc_per_node=2"]),
        (["bash", "-x"], ["python"]),
        (["timeout", "500", "python"], ["python"]),
        (["nice", "accelerate", "launch", *config], ["accelerate", "launch", *config]),
    ):
        assert launch_command([*parent, *tail]) == [*launcher, *tail]
    assert launch_command(["bash", "run.sh"]) == launch_command([]) == ["python", *tail]
    assert launch_command(["accelerate", "launch", "train_phase1.py", "--other"]) == ["python", *tail]


def test_a_stopped_run_is_continued_by_its_own_command():
    command = ["accelerate", "launch", "train_phase1.py", "--output_dir", "my runs"]
    line = "accelerate launch train_phase1.py --output_dir 'my runs' --resume_from_checkpoint latest"
    assert resume_command(command, options()) == line
    latest = options(["--resume_from_checkpoint=latest"])  # perhaps from a --config
    assert resume_command(command, latest) == line.removesuffix(" --resume_from_checkpoint latest")
    for given in (["--resume_from_checkpoint", "checkpoint-2"], ["--resume_from_checkpoint=checkpoint-2"]):
        assert resume_command([*command, *given], options(["--resume_from_checkpoint=checkpoint-2"])) == line


def test_the_command_of_phase_2_keeps_what_both_phases_need():
    args = options(["--real_dataset", "a b:2", "c", "--height=64", "--lr_warmup_steps=7", "--report_to", "none"])
    line = phase2_command(["accelerate", "launch", "train_phase1.py"], args)
    assert line == (
        f"accelerate launch train_phase2.py --resume_backbone_from {Path.cwd()}/out/best "
        "--real_dataset 'a b:2' c --height 64 --report_to none "
        f"--output_dir {Path.cwd()}/phase2 --cg_dataset data/cg --resume_from_checkpoint latest"
    )
    assert phase2_command(["python", "-m", "pytest"], args) == line  # called from another program
    assert len(next_commands(["python", "train_phase2.py"], phase2_options())) == 2


def test_phase_2_takes_its_config_from_beside_that_of_phase_1(tmp_path):
    typed = ["--height", "64", "--output_dir", str(tmp_path / "out")]
    (tmp_path / "phase1.yaml").write_text("real_dataset: data/real\n")
    (tmp_path / "phase2.yaml").write_text("cg_dataset: data/pairs\nreal_dataset: data/other\ndinov3: small\n")
    configured = ["--config", str(tmp_path / "phase1.yaml"), *typed]
    words = shlex.split(phase2_command(["train_phase1.py", *configured], cli.parse(PHASE1, configured)))
    args = cli.parse(PHASE2, words[words.index("train_phase2.py") + 1 :])
    assert (args.dinov3, args.cg_dataset, args.height) == ("small", ["data/pairs"], 64)
    assert args.real_dataset == ["data/real"]  # that of phase 1

    (tmp_path / "phase1.yaml").rename(tmp_path / "mine.yaml")
    configured = ["--config", str(tmp_path / "mine.yaml"), *typed]
    line = phase2_command(["train_phase1.py", *configured], cli.parse(PHASE1, configured))
    assert "--config" not in line
    assert "--cg_dataset data/cg" in line


@pytest.mark.parametrize("command", [["python", ""], ["python", "-c"], ["renamed.py", "/"], ["train_phase1.py"]])
@pytest.mark.parametrize(("out", "best", "phase2"), [(".", "best", "../phase2"), ("/", "/best", "/phase2")])
def test_no_folder_or_command_ends_the_run_instead_of_a_line(command, out, best, phase2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = shlex.split(phase2_command(command, options(["--output_dir", out])))
    given = {name: (tmp_path / words[words.index(f"--{name}") + 1]) for name in ("resume_backbone_from", "output_dir")}
    assert given["resume_backbone_from"] == tmp_path / best
    assert given["output_dir"] == (tmp_path / phase2).resolve()


def test_a_run_is_closed_before_its_last_lines_are_printed(tmp_path, monkeypatch):
    closed = []
    run = run_of(options(["--output_dir", str(tmp_path)]))
    run.watchdog = SimpleNamespace(close=lambda: closed.append("watchdog"))
    run.lock = SimpleNamespace(close=lambda: closed.append("lock"))
    monkeypatch.setattr(run_module, "next_commands", lambda *values: closed.append("printed") or [])
    run.close()
    assert closed == ["watchdog", "lock", "printed"]
