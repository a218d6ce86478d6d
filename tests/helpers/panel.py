"""Coarse videos and values of the fields of c2r.panel."""

import numpy as np

from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH

#: What a page sends before a user has touched its fields.
FIELDS = {
    "prompt": "the street",
    "negative_prompt": "",
    "conditioning_scale": 0.9,
    "num_inference_steps": 2,
    "num_frames": FRAMES,
    "seed": 0,
    "guidance": "apg",
    "guidance_scale": 10.0,
    "control_guidance_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "follow_control": False,
    "sequence_fps": FPS,
}


def noise(seed, num_frames=12, height=HEIGHT, width=WIDTH):
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)  # blocks of colour: they survive the codec


def ignore(step, steps, text):
    pass
