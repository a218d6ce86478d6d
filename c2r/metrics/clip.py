"""The videos of one clip that is evaluated."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EvaluatedClip:
    """A generated video and what it is measured against.

    Args:
        name: of its scene. Clips of one name are of one scene and have one truth.
        prompt: the prompt that it was generated from; empty if there is none.
        video: (F, 3, H, W) float32 RGB in [0, 1], generated.
        control: the coarse video, like `video`; None if there is none.
        truth: a fine or real video of the same scene, like `video`; None if there is none.
        ids: (F, H, W) int32, the renderer's object ids, 0 is the background; None if there are none.
        depth: (F, H, W) float32, the renderer's distance from the camera in any unit, larger is farther; inf or nan
            where there is no surface. None if there is none.

    Raises:
        ValueError: a shape or dtype is wrong.
    """

    name: str
    prompt: str
    video: torch.Tensor
    control: torch.Tensor | None = None
    truth: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    depth: torch.Tensor | None = None

    def __post_init__(self):
        shape = tuple(self.video.shape)
        if len(shape) != 4 or shape[1] != 3 or 0 in shape:
            raise ValueError(f"{self.name}: video is {shape}: expected (F, 3, H, W)")
        maps = (shape[0], *shape[2:])
        expected = {
            "video": (shape, torch.float32),
            "control": (shape, torch.float32),
            "truth": (shape, torch.float32),
            "ids": (maps, torch.int32),
            "depth": (maps, torch.float32),
        }
        for field, (wanted, dtype) in expected.items():
            tensor = getattr(self, field)
            if tensor is not None and (tuple(tensor.shape), tensor.dtype) != (wanted, dtype):
                raise ValueError(
                    f"{self.name}: {field} is {tuple(tensor.shape)} {tensor.dtype}: expected {wanted} {dtype}"
                )
