"""Run the project's commands as a user would."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from c2r import InputError

#: The clone: it holds the training scripts and the accelerate configs, which an installed package does not.
ROOT = Path(__file__).resolve().parents[2]
PHASE1, PHASE2 = ROOT / "train_phase1.py", ROOT / "train_phase2.py"
CPU_CONFIG = ROOT / "accelerate_configs/cpu.yaml"
LAUNCH = ["accelerate", "launch", "--config_file", str(CPU_CONFIG)]


def require_clone():
    """Check that the training scripts are there.

    Raises:
        InputError: the package was installed without them.
    """
    for path in (PHASE1, PHASE2, CPU_CONFIG):
        if not path.exists():
            raise InputError(
                f"{path}: not found; the training scripts are not part of the installed package: clone the repository "
                "and run this command in the clone"
            )


def run_command(command: Sequence[str], output: TextIO | None = None, **variables: str) -> int:
    """Run a command that starts with "python" or "accelerate launch" by the interpreter of this process.

    Args:
        command: as typed in a shell.
        output: file for its output and errors; None: those of this process.
        variables: added to the environment.

    Returns:
        its exit status.
    """
    if command[:2] == ["accelerate", "launch"]:
        command = ["python", "-m", "accelerate.commands.launch", *command[2:]]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    return subprocess.run(
        [sys.executable, *command[1:]],
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        env=environment | variables,
    ).returncode
