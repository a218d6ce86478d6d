"""Tiny models of both phases as they are saved, and a model sharded as FSDP2 shards it among many processes."""

import shutil

import pytest
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import PhaseContract, save_phase
from c2r.models.controlnet import C2RControlNet
from tests.helpers.tiny import FEATURE_DIM, tiny_transformer


@pytest.fixture
def shard(one_process):
    """Return a function that shards a model's blocks and the model.

    One rank shards as many do: a parameter read outside a hooked forward would be a DTensor and raise.
    """

    def shard_model(model):
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        for module in reversed(list(model.modules())):
            if type(module).__name__ in model._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)

    return shard_model


@pytest.fixture
def pipeline(tiny_models):
    """The folder of a Wan pipeline, which tests share: they change copies."""
    return tiny_models / "pipeline"


@pytest.fixture
def phases(pipeline, tmp_path):
    """A folder with a finished phase 1 and phase 2 and their base model: model, phase1/best, phase2/best."""
    shutil.copytree(pipeline, tmp_path / "model")
    transformer = tiny_transformer(seed=3)
    save_phase(tmp_path / "phase1/best", transformer, PhaseContract(1, str(tmp_path / "model"), 100, 0.25))
    controlnet = C2RControlNet.from_transformer(transformer, 2, 1, FEATURE_DIM)
    contract = PhaseContract(
        phase=2,
        base_model=str(tmp_path / "model"),
        step=200,
        validation_loss=0.125,
        dataset_fingerprints={"real": "abc"},
        height=32,
        width=48,
        num_frames=9,
        fps=16,
        backbone=str(tmp_path / "phase1/best"),
        backbone_sha256=fingerprint_transformer(tmp_path / "phase1/best"),
        dinov3="facebook/dinov3-vitb16-pretrain-lvd1689m",
    )
    save_phase(tmp_path / "phase2/best", controlnet, contract)
    return tmp_path
