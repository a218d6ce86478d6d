"""Folders of tiny trained models, as the two phases save them."""

from pathlib import Path

import torch

from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.controlnet import C2RControlNet
from tests.helpers import tiny

FRAMES, HEIGHT, WIDTH, FPS = 5, 32, 48, 8.0
SIZE = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "fps": FPS}
METRICS = {"loss": 0.4, "loss_at_start": 0.5, "control_gain": 0.0851, "cg_share": 0.2}


def save_trained_models(folder: Path) -> Path:
    """Write base/ (a Wan pipeline), dinov3/, phase1/best and phase2/best, whose residuals are not zero."""
    base, dinov3, phase1 = str(folder / "base"), str(folder / "dinov3"), folder / "phase1/best"
    tiny.save_tiny_pipeline(base)
    tiny.save_tiny_dinov3(dinov3)
    transformer = tiny.tiny_transformer(seed=5)
    save_phase(phase1, transformer, PhaseContract(phase=1, base_model=base, step=1, **SIZE))
    torch.manual_seed(1)
    controlnet = C2RControlNet.from_transformer(transformer, control_layers=2, feature_dim=tiny.FEATURE_DIM)
    for control_block in controlnet.control_blocks:
        torch.nn.init.normal_(control_block.projector[2].weight, std=0.5)
    contract = PhaseContract(
        phase=2,
        base_model=base,
        step=30,
        validation_loss=0.4,
        metrics=METRICS,
        dataset_fingerprints={"real": "ab12", "cg": "cd34"},
        num_clips={"real": 40, "cg": 12},
        **SIZE,
        flow_shift=2.0,
        conditioning_scale=0.9,
        backbone=str(phase1),
        backbone_sha256=fingerprint_transformer(phase1),
        dinov3=dinov3,
    )
    save_phase(folder / "phase2/best", controlnet, contract)
    return folder
