"""Run a training script within the test process, where hooks can look at its models and its optimizer."""

import signal

from accelerate.state import AcceleratorState, GradientState

from c2r import cli
from c2r.cli import SIGNALS
from c2r.training.engine import build_accelerator
from c2r.training.setup import start_run


def run_script(script, command, argv):
    """Run a script to its end; return its options.

    Args:
        script: `train_phase1` or `train_phase2`.
        command: its `Command`.
        argv: its arguments.
    """
    args = cli.parse(command, argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        script.train(start_run(args, build_accelerator(args)))
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return args
