"""The training loop that the stages share, and clips as models take them."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import nn

from c2r import InputError

logger = logging.getLogger(__name__)

#: The last scenes, on which no stage trains.
HELD_OUT = 32


def fit(
    name: str,
    module: nn.Module,
    draw_loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    work_dir: Path,
    on_log: Callable[[], str] | None = None,
    log_every: int = 100,
):
    """Minimise a loss by AdamW in one cycle of the learning rate and of beta 1, gradients clipped at norm 1.

    The state is saved in work_dir with every line of the log. An interrupted stage continues from it, and ends with
    the same weights.

    Args:
        name: of the stage, in the log and of the state's file.
        module: trained in place.
        draw_loss: takes the number of the step, from which everything random follows; returns a scalar.
        steps: number of optimizer steps.
        learning_rate: at its peak.
        work_dir: gets the state.
        on_log: returns text for the log.
        log_every: steps between two lines of the log.

    Raises:
        InputError: the state in work_dir is of another schedule.
        RuntimeError: a gradient is not finite.
    """
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.03)
    path, first, settings = work_dir / f"{name}.pt", 0, {"steps": steps, "learning_rate": learning_rate}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            raise InputError(f"{path}: is of {state['settings']}, the stage now has {settings}; delete the file")
        first = state["step"]
        for part, content in ((module, "module"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[content])
        logger.info("%s continues at step %d", name, first)
    started, total = time.time(), 0.0
    for step in range(first, steps):
        loss = draw_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % log_every == 0:
            line = f"{name} step {step + 1}/{steps} loss {total / log_every:.4f}, {time.time() - started:.0f} s"
            logger.info(line + (f" {on_log()}" if on_log else ""))
            total = 0.0
            parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "schedule": schedule}
            contents = {content: part.state_dict() for content, part in parts.items()}
            torch.save(contents | {"step": step + 1, "settings": settings}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)


def to_pixel_values(clips: np.ndarray) -> torch.Tensor:
    """Convert (..., F, H, W, 3) uint8 to (..., 3, F, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(clips)).float() / 127.5 - 1, "... f h w c -> ... c f h w")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pixel values in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()
