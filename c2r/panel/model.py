"""The loaded model, and what all visitors of its page share."""

import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from c2r import InputError
from c2r.generation.models import check_files, find_model, load_models
from c2r.panel.loras import find_loras

if TYPE_CHECKING:
    import torch

    from c2r.models.contract import PhaseContract
    from c2r.pipeline import C2RPipeline


@dataclass
class Panel:
    """A loaded model, and what all visitors of its page share."""

    args: Namespace  #: options of the command, completed from the contract
    given: dict[str, Any]  #: those of them that `c2r.generate` has too, as they were given
    contract: "PhaseContract"
    pipeline: "C2RPipeline"
    folder: Path  #: for uploads and videos; removed at the end
    lock: threading.Lock = field(default_factory=threading.Lock)  #: held by the job that runs
    jobs: dict[threading.Event, str] = field(default_factory=dict)  #: {set to cancel a job: session of its user}

    @property
    def has_control(self) -> bool:
        return self.contract.phase == 2

    @contextmanager
    def job(self, session: str) -> Iterator[threading.Event]:
        """Run the block when no other job runs; it gives an event that `cancel` sets."""
        cancelled = threading.Event()
        self.jobs[cancelled] = session
        try:
            with self.lock:
                yield cancelled
        finally:
            del self.jobs[cancelled]

    def cancel(self, session: str) -> int:
        """Cancel the jobs of one user, each of which ends after the step that runs; return their number."""
        found = [cancelled for cancelled, owner in list(self.jobs.items()) if owner == session]
        for cancelled in found:
            cancelled.set()
        return len(found)

    def describe(self) -> str:
        """Return a line about the model."""
        args = self.args
        return (
            f"{args.model}, phase {self.contract.phase}, step {self.contract.step:,}: {args.height}x{args.width}, "
            f"{args.num_frames} frames at {args.fps:g} per second ({args.num_frames / args.fps:.1f} s)"
        )


def check_model(args: Namespace, device: str) -> "tuple[PhaseContract, torch.dtype]":
    """Check model and options as `c2r.generate` does, reading headers only. Completes `args` from the contract.

    Args:
        args: options of the command.
        device: where the models are to run.

    Returns:
        see `find_model`.

    Raises:
        InputError: a model is missing or does not fit, or an option does not fit this machine.
    """
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.lora import require_peft
    from c2r.models.lora_file import LoraFile

    for name in ("conditioning_scale", "guidance", "guidance_scale", "control_guidance_scale", "control_video"):
        setattr(args, name, None)
    contract, dtype = find_model(args, device, with_control=True)
    check_files(args, contract, [LoraFile(path, scale) for path, scale in args.lora or []])
    if args.lora_dir is not None:
        require_peft()
        if not find_loras(args.lora_dir):
            raise InputError(f"--lora_dir {args.lora_dir}: holds no .safetensors files; give the folder of LoRAs")
    if contract.phase == 2:
        check_dinov3(args.dinov3, [(args.height, args.width)])
    return contract, dtype


def load_panel(
    args: Namespace, given: dict[str, Any], contract: "PhaseContract", folder: Path, device: str, dtype: "torch.dtype"
) -> Panel:
    """Load everything that a video needs; unlike in `c2r.generate`, the text encoder stays loaded.

    Raises:
        InputError: see `C2RPipeline.from_pretrained`.
    """
    import torch

    from c2r.models.lora_file import LoraFile
    from c2r.models.parts import load_text_encoder

    parts: dict[str, Any] = {"dinov3": args.dinov3} if contract.phase == 2 else {}
    if not args.cpu_offload:
        parts["text_encoder"] = None
    loras = [LoraFile(path, scale) for path, scale in args.lora or []]
    pipeline = load_models(args, device, dtype, loras, **parts)
    if not args.cpu_offload:
        # Last: where it does not fit beside the others, its blocks stay on the CPU.
        text_encoder = load_text_encoder(args.pretrained_model_name_or_path, dtype, torch.device(device))
        pipeline.register_modules(text_encoder=text_encoder)
    pipeline.set_progress_bar_config(disable=True)  # the page shows it
    return Panel(args, given, contract, pipeline, folder)
