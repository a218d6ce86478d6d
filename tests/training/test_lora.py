"""Phase 1 with --lora_rank: what trains, what is saved, resumed, and built upon."""

import json

import pytest
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import load_file

from c2r import InputError, cli
from c2r.models.assembly import load_for_generation
from c2r.models.backbone import fingerprint_transformer, load_transformer
from c2r.models.contract import read_contract
from c2r.models.lora_file import WEIGHTS
from c2r.options import ESTIMATE, PHASE1
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
        assert len(tensors) == 4 * 10 * 2
        assert not (folder / "diffusion_pytorch_model.safetensors").exists()
        assert all(name.startswith("transformer.blocks.") for name in tensors)
        assert all(tensor.dtype == torch.float32 and tensor.any() for tensor in tensors.values())
    contract = read_contract(out / "final")
    assert (contract.lora_rank, contract.backbone) == (4, str(base))
    assert contract.backbone_sha256 == fingerprint_transformer(base)
    trained, averaged = load_file(out / f"checkpoint-4/model/{WEIGHTS}"), load_file(out / f"final/{WEIGHTS}")
    assert trained.keys() == averaged.keys()
    assert not same(trained, averaged)


def test_resumes_bit_for_bit(run, tiny_models, small_datasets, tmp_path):
    out, _ = run
    succeed(*phase1(tiny_models, small_datasets, tmp_path, *LORA, "--max_train_steps=2"), by=fork)
    resumed = ("--max_train_steps=4", "--resume_from_checkpoint=latest")
    succeed(*phase1(tiny_models, small_datasets, tmp_path, *LORA, *resumed), by=fork)
    for name in ("final", "checkpoint-4/model"):
        assert same(load_file(tmp_path / name / WEIGHTS), load_file(out / name / WEIGHTS))
    refused = fork(*phase1(tiny_models, small_datasets, tmp_path, "--lora_rank=2", *LORA[1:], *resumed))
    assert "--lora_rank 2: " in refused.stderr
    assert "was written with 4" in refused.stderr


def test_memory_modes_train_the_same(run, tiny_models, small_datasets, tmp_path):
    modes = ("--offload_backbone", "--ffn_chunks=2", "--gradient_checkpointing=selective", "--offload_activations")
    succeed(*phase1(tiny_models, small_datasets, tmp_path, *LORA, *modes, "--max_train_steps=4"), by=fork)
    trained, expected = load_file(tmp_path / "final" / WEIGHTS), load_file(run[0] / "final" / WEIGHTS)
    for name, tensor in trained.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-4)


def test_phase_2_and_generation_take_the_sum(run, tiny_models, small_datasets, tmp_path):
    lora, base = run[0] / "final", tiny_models / "pipeline"
    out = tmp_path / "phase2"
    succeed(*phase2(tiny_models, small_datasets, lora, out, "--max_train_steps=1", "--num_samples=0"), by=fork)
    contract = read_contract(out / "final")
    assert (contract.backbone, contract.backbone_base) == (str(lora), str(base))
    assert contract.backbone_sha256 == fingerprint_transformer(lora) != fingerprint_transformer(base)

    joined, _ = load_for_generation(out / "final")
    alone, _ = load_for_generation(lora)
    changed = load_file(lora / WEIGHTS)
    for name, weight in WanTransformer3DModel.from_pretrained(base, subfolder="transformer").state_dict().items():
        layer = f"transformer.{name.removesuffix('.weight')}"
        if f"{layer}.lora_A.weight" in changed:
            weight = weight + changed[f"{layer}.lora_B.weight"] @ changed[f"{layer}.lora_A.weight"]
        torch.testing.assert_close(joined.transformer.state_dict()[name], weight, rtol=0, atol=1e-6)
        assert torch.equal(alone.state_dict()[name], joined.transformer.state_dict()[name])
    # Rounded once: cast after the sum.
    half = load_transformer(lora, torch_dtype=torch.bfloat16).state_dict()["blocks.0.ffn.net.2.weight"]
    assert torch.equal(half, alone.state_dict()["blocks.0.ffn.net.2.weight"].bfloat16())

    moved = json.loads((lora / "c2r.json").read_text())
    assert moved["backbone"].startswith(".")  # relative: both folders can be moved together


def test_options_fit_each_other():
    def parsed(*given):
        return cli.parse(PHASE1, ["--real_dataset=data", "--output_dir=out", *given])

    assert parsed().learning_rate == 1e-5
    assert parsed("--lora_rank=64").learning_rate == 1e-4
    assert parsed("--lora_rank=64", "--preset=24gb").optimizer == "adamw8bit"
    assert parsed("--lora_rank=64", "--learning_rate=2e-4").learning_rate == 2e-4
    with pytest.raises(InputError, match="give --lora_rank, which freezes it"):
        parsed("--offload_backbone")
    with pytest.raises(InputError, match="phase 2 trains no LoRA"):
        cli.parse(ESTIMATE, ["--phase=2", "--lora_rank=64"])
