"""Phase 1 with --lora_rank: what trains, what is saved, resumed, and built upon."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from c2r.models.assembly import fingerprint_transformer, load_for_generation, load_transformer
from c2r.models.contract import read_contract
from c2r.models.lora import WEIGHTS
from tests.helpers.commands import phase1, phase2, same, succeed
from tests.helpers.forks import fork

LORA = ("--lora_rank=4", "--learning_rate=1e-2", "--ema_decay=0.9")


@pytest.fixture(scope="module")
def run(tiny_models, small_datasets, tmp_path_factory):
    """Train a LoRA for four steps; return its folder and the finished process."""
    out = tmp_path_factory.mktemp("lora") / "phase1"
    return out, succeed(*phase1(tiny_models, small_datasets, out, *LORA, "--max_train_steps=4"), by=fork)


def test_saves_the_lora_alone_and_names_its_backbone(run, tiny_models):
    out, _ = run
    base = tiny_models / "pipeline"
    for folder in (out / "best", out / "final", out / "checkpoint-4/model"):
        tensors = load_file(folder / WEIGHTS)
        assert len(tensors) == 4 * 10 * 2 and not (folder / "diffusion_pytorch_model.safetensors").exists()
        assert all(name.startswith("transformer.blocks.") for name in tensors)
        assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors.values())
    contract = read_contract(out / "final")
    assert (contract.lora_rank, contract.backbone) == (4, str(base))
    assert contract.backbone_sha256 == fingerprint_transformer(base)
    trained, averaged = load_file(out / f"checkpoint-4/model/{WEIGHTS}"), load_file(out / f"final/{WEIGHTS}")
    assert trained.keys() == averaged.keys() and not same(trained, averaged)
