"""Quality of frames without any reference, by pyiqa."""

from math import inf

import torch

from c2r import InputError
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.metric import Against
from c2r.metrics.networks import chunks


class Quality:
    """Mean over the frames of a no-reference measure of pyiqa, such as musiq, niqe or clipiqa+; `quality_musiq`.

    pyiqa downloads the weights itself, also such as are not safetensors.

    Args:
        measure: its name in pyiqa.
        device: where it runs; "meta": it is loaded to the CPU.

    Raises:
        InputError: pyiqa cannot be imported, has no such measure or not its weights, or it needs a reference.
    """

    against: Against = "itself"
    bounds = (-inf, inf)

    def __init__(self, measure: str, device: torch.device | str):
        try:
            import pyiqa
        except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision of another torch
            raise InputError(
                f"{measure}: pyiqa cannot be imported ({error}); install it with the torchvision of this torch"
            ) from error
        if measure not in pyiqa.list_models(metric_mode="NR"):
            raise InputError(f"{measure}: pyiqa has no such measure without a reference; see pyiqa.list_models()")
        if torch.device(device).type == "meta":  # pyiqa has no check without loading, and may have to download first
            device = "cpu"
        try:
            self.model, self.device = pyiqa.create_metric(measure, device=torch.device(device)), device
        except OSError as error:
            raise InputError(
                f"{measure}: pyiqa cannot get its weights ({error}); run it once where there is a connection"
            ) from error
        self.name, self.unit = f"quality_{measure}", measure
        self.higher_is_better: bool | None = not self.model.lower_better

    @torch.no_grad()
    def __call__(self, clip: EvaluatedClip) -> float | None:
        return torch.cat([self.model(frames).reshape(-1) for frames in chunks(clip.video, self.device)]).mean().item()
