"""Folders of both phases as a training run leaves them, of tiny random models, without a run."""

import torch

from c2r.models.assembly import fingerprint_transformer
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.controlnet import C2RControlNet
from tests.helpers import tiny


def save_phases(folder, **contract):
    """Write base/, dinov3/, phase1/ and phase2/, whose residuals are not zero; returns the folder.

    Args:
        folder: an empty folder.
        contract: entries of both contracts, such as the size.
    """
    base, dinov3, phase1 = str(folder / "base"), str(folder / "dinov3"), folder / "phase1"
    tiny.save_tiny_pipeline(base)
    tiny.save_tiny_dinov3(dinov3)
    transformer = tiny.tiny_transformer(seed=5)
    save_phase(phase1, transformer, PhaseContract(phase=1, base_model=base, step=1, **contract))
    torch.manual_seed(1)
    controlnet = C2RControlNet.from_transformer(transformer, control_layers=2, feature_dim=tiny.FEATURE_DIM)
    for control_block in controlnet.control_blocks:
        torch.nn.init.normal_(control_block.projector[2].weight, std=0.5)
    models = {"backbone": str(phase1), "backbone_sha256": fingerprint_transformer(phase1), "dinov3": dinov3}
    save_phase(folder / "phase2", controlnet, PhaseContract(phase=2, base_model=base, step=1, **contract, **models))
    return folder
