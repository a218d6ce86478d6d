"""Plant mistakes with devices in the code, one after another, and record what the simulated device does.

The commands run without mistakes first, and the lines that make the host wait for the device are counted.

    python tests/helpers/on_simulated_device.py tests/helpers/device_mistakes.py COMMANDS.json OUTCOMES.json

COMMANDS.json holds the arguments of each command, by its name here; {} in them stands for a folder of their own. A
mistake is planted in one function of this process, which costs far less than another process for a changed copy.
"""

import inspect
import json
import sys
import textwrap
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

import c2r.generate
import train_phase2
from c2r import cli
from c2r.encoding.encoding_pass import _encode_batch
from c2r.evaluation.conditions import _ControlBranch
from c2r.guidance import guided_velocity
from c2r.models import streaming
from c2r.models.vae import decode_frames
from c2r.options import PHASE2
from c2r.training.engine import build_accelerator
from c2r.training.setup import start_run
from c2r.training.step import domain_weights, make_noisy_batch
from tests.helpers.simulated_device import NAME, waits


@dataclass(frozen=True)
class Mistake:
    """A line of a function that is right, and the wrong one that takes its place."""

    function: Callable
    right: str
    wrong: str
    command: str = "train"  #: the command that shows it


MISTAKES = {
    "noise left on the CPU": Mistake(make_noisy_batch, "to_device(noise, device)", "noise"),
    "timesteps left on the CPU": Mistake(
        make_noisy_batch, "timesteps_from_sigmas(sigmas)", "timesteps_from_sigmas(sigmas.cpu())"
    ),
    "prompts left on the CPU": Mistake(make_noisy_batch, "to_device(prompt_embeds, device)", "prompt_embeds"),
    "mask left on the CPU": Mistake(
        make_noisy_batch,
        "to_device(control_draws < settings.control_dropout, device)",
        "control_draws < settings.control_dropout",
    ),
    "generator of the CPU for noise of the device": Mistake(
        make_noisy_batch,
        "torch.randn(mean.shape[1:], generator=g)",
        "torch.randn(mean.shape[1:], generator=g, device=device)",
    ),
    "new tensor without a device": Mistake(domain_weights, ", device=domains.device", ""),
    "control frames left on the CPU": Mistake(
        train_phase2.train, 'to_device(batch["control_frames"], device)', 'batch["control_frames"]'
    ),
    "cached features left on the CPU": Mistake(
        train_phase2.train,
        'to_device(batch["control_features"], device)',
        'batch["control_features"]',
        "encode and train",
    ),
    "control of the validation left on the CPU": Mistake(_ControlBranch.frames, ".to(self.device)", ""),
    "clip to encode left on the CPU": Mistake(
        _encode_batch, "batch.frames.to(device)", "batch.frames", "encode and train"
    ),
    "zeros without a device in the sampler": Mistake(guided_velocity, "torch.zeros(())", "torch.zeros(1)"),
    "array of a tensor on the device": Mistake(decode_frames, ".cpu().numpy()", ".numpy()"),
    "latents moved to an offloaded VAE": Mistake(
        streaming._stream, ".to(device)", ".to(vae.device)", "generate with offloading"
    ),
}


#: Expressions of a CPU tensor and one on another device, and whether CUDA refuses them.
EXPRESSIONS = {
    "device + cpu": True,
    "device * torch.tensor(2.0)": False,
    "cpu * torch.tensor(2.0, device=device.device)": True,
    "torch.stack([device.sum(), cpu.sum()])": True,
    "torch.where(device > 0, device, cpu)": True,
    "device[cpu.long()]": False,
    "cpu[device.long()]": True,
    "device[cpu > 0]": False,
    "device.index_select(0, cpu.long())": True,
    "device.index_put((cpu.long(),), cpu)": True,
    "device.copy_(cpu)": False,
    "device.numpy()": True,
    "torch.nn.functional.mse_loss(device, cpu)": True,
    "torch.randn(3, device=device.device, generator=torch.Generator())": True,
    "torch.cat([device, cpu])": True,
}


def refuses(expression: str, device: str) -> bool:
    """Return True if a device refuses an expression, see EXPRESSIONS."""
    tensors = {"cpu": torch.ones(3), "device": torch.ones(3).to(device)}
    try:
        eval(expression, {"torch": torch}, tensors)
    except (RuntimeError, TypeError):
        return True
    return False


@contextmanager
def planted(mistake: Mistake):
    """Make a mistake within the context."""
    function = inspect.unwrap(mistake.function)
    source, right = textwrap.dedent(inspect.getsource(function)), function.__code__
    if source.count(mistake.right) != 1:
        raise ValueError(f"{mistake.right!r} stands {source.count(mistake.right)} times in {function.__qualname__}")
    scope: dict = {}
    exec(compile(source.replace(mistake.right, mistake.wrong), right.co_filename, "exec"), function.__globals__, scope)
    function.__code__ = inspect.unwrap(scope[function.__name__]).__code__  # also where it was imported by name
    try:
        yield
    finally:
        function.__code__ = right


def train(argv: list[str]):
    args = cli.parse(PHASE2, argv)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    run = start_run(args, build_accelerator(args))
    start_training = run.start_training

    def start_counting():
        start_training()
        waits.clear()

    run.start_training = start_counting
    run.progress.validated_step = 0  # that validation would cost more than all the rest; the one at the end remains
    try:
        train_phase2.train(run)
    finally:
        run.watchdog.close()


RUN = {
    "train": train,
    "train on micro-batches": train,
    "encode and train": train,
    "generate with offloading": c2r.generate.main,
}


def outcome(command: str, argv: list[str]) -> str | None:
    """Run a command; return its error as "Class: message", or None."""
    try:
        RUN[command](argv)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def main():
    commands = json.loads(Path(sys.argv[1]).read_text())
    output = Path(sys.argv[2])

    def argv(command, number):
        return [argument.replace("{}", str(output.with_name(f"run{number}"))) for argument in commands[command]]

    outcomes, waits_of = {}, {}
    for number, command in enumerate(RUN):
        waits.clear()
        outcomes[command] = outcome(command, argv(command, number))
        waits_of[command] = dict(waits)
    for number, (name, mistake) in enumerate(MISTAKES.items(), start=len(RUN)):
        with planted(mistake):
            outcomes[name] = outcome(mistake.command, argv(mistake.command, number))
    refused = [expression for expression in EXPRESSIONS if refuses(expression, NAME)]
    output.write_text(json.dumps({"outcomes": outcomes, "refused": refused, "waits": waits_of}))


if __name__ == "__main__":
    main()
