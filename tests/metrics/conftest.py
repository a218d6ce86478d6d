"""Rendered scenes, and the tiny networks of measures."""

from dataclasses import replace

import pytest
import torch

from c2r.metrics.clip import EvaluatedClip
from c2r.toy.city import make_scene, render
from tests.helpers import metric_networks

SCENES = 4


def to_video(frames):
    """Turn (F, H, W, 3) uint8 into (F, 3, H, W) floats in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="session")
def scenes():
    """Four scenes of 3 frames of 96x160 as {look: (F, 3, H, W)}, `kinds` as (F, H, W) int32."""
    rendered = [render(make_scene(seed), num_frames=3) for seed in range(SCENES)]
    return [
        {look: to_video(frames) for look, frames in one.items() if look != "kinds"}
        | {"kinds": torch.from_numpy(one["kinds"]).int()}
        for one in rendered
    ]


@pytest.fixture(scope="session")
def clips(scenes):
    """The CG look of each scene as the generated video, the real look as its truth."""
    return [
        EvaluatedClip(f"{i}.mp4", "a street rain", one["cg"], one["coarse"], one["real"], one["kinds"])
        for i, one in enumerate(scenes)
    ]


@pytest.fixture(scope="session")
def small_clips(clips):
    """The same at half the size, for networks that take long."""
    videos = ("video", "control", "truth", "ids")
    return [replace(clip, **{name: getattr(clip, name)[..., ::2, ::2] for name in videos}) for clip in clips]


@pytest.fixture(scope="session")
def networks(tmp_path_factory):
    """{role: folder} of tiny random networks."""
    folder = tmp_path_factory.mktemp("networks")
    save = {
        "lpips": metric_networks.save_vgg16,
        "depth": metric_networks.save_depth_anything,
        "segmentation": metric_networks.save_segformer,
        "image_features": metric_networks.save_dinov2,
        "video_features": metric_networks.save_vjepa2,
        "clip": metric_networks.save_clip,
    }
    return {role: function(folder / role) for role, function in save.items()}
