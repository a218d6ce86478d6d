"""Parts around the transformer: agreement with Diffusers, one line for unfit ones, too large a text encoder."""

import logging
import shutil

import pytest
import torch
import transformers
from diffusers import WanPipeline
from safetensors.torch import load_file, save_file
from transformers import UMT5Config, UMT5EncoderModel

from c2r.models import parts
from c2r.models.offloading import StoredBlock
from c2r.models.parts import TEXT_ENCODER_ROOM, freeze, load_pipeline_part, load_text_encoder
from c2r.pipeline import encode_prompts
from tests.helpers.checks import equal_weights, refusal
from tests.helpers.tiny import TEXT_DIM, save_tiny_pipeline, tiny_transformer

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_pipeline_parts_are_frozen_and_agree_with_a_stock_pipeline(pipeline, dtype):
    stock = WanPipeline.from_pretrained(pipeline, torch_dtype=dtype or torch.float32)
    for part in ("vae", "text_encoder"):
        model = load_pipeline_part(pipeline, part, torch_dtype=dtype)
        assert equal_weights(model, getattr(stock, part))
        assert not model.training
        assert not any(parameter.requires_grad for parameter in model.parameters())
    assert load_pipeline_part(pipeline, "tokenizer")("a red city").input_ids == stock.tokenizer("a red city").input_ids
    assert load_pipeline_part(pipeline, "scheduler").config.shift == 3.0


def test_unfit_pipeline_parts_are_refused(pipeline, tmp_path):
    broken = shutil.copytree(pipeline, tmp_path / "broken")
    shutil.copy(pipeline / "vae/config.json", broken / "text_encoder/config.json")
    assert "model type is None, but umt5 is needed" in refusal(load_pipeline_part, broken, "text_encoder")
    weights = load_file(broken / "vae" / WEIGHTS)
    del weights["quant_conv.bias"]
    save_file(weights, broken / "vae" / WEIGHTS)
    assert "weights are missing: quant_conv.bias" in refusal(load_pipeline_part, broken, "vae")
    (broken / "unet").mkdir()
    with pytest.raises(ValueError, match="part is 'unet'"):
        load_pipeline_part(broken, "unet")


def test_models_load_unsharded_while_zero3_is_on():
    class ZeRO3:
        def is_zero3(self):
            return True

    integration, config = transformers.integrations.deepspeed, ZeRO3()
    integration.set_hf_deepspeed_config(config)
    try:
        with parts.unsharded_loading():
            assert not integration.is_deepspeed_zero3_enabled()
        assert integration.is_deepspeed_zero3_enabled()
    finally:
        integration.unset_hf_deepspeed_config()
    with parts.unsharded_loading():
        assert not integration.is_deepspeed_zero3_enabled()


def test_freeze_switches_off_gradients_and_training_mode():
    model = tiny_transformer().train()
    assert freeze(model) is model
    assert not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())


def pipeline_with(num_layers, dtype, folder):
    save_tiny_pipeline(folder)
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=num_layers, num_heads=2)
    UMT5EncoderModel(config).to(dtype).save_pretrained(folder / "text_encoder")
    return folder


def test_a_streamed_text_encoder_gives_the_same_embeddings(tmp_path, monkeypatch, caplog):
    """Bit for bit, in both dtypes, for several prompts one after another."""
    prompts = ["", "a street in the rain", "a tram"]
    for dtype in (torch.float32, torch.bfloat16):
        folder = pipeline_with(3, dtype, tmp_path / str(dtype))
        expected = encode_prompts(folder, prompts, "cpu", dtype)
        text_encoder = load_text_encoder(folder, dtype, CPU)
        needed = sum(parameter.nbytes for parameter in text_encoder.parameters())
        with caplog.at_level(logging.INFO):
            fits = load_text_encoder(folder, dtype, CPU, free=needed + TEXT_ENCODER_ROOM)
            assert "do not fit" not in caplog.text
            streamed = load_text_encoder(folder, dtype, CPU, free=needed + TEXT_ENCODER_ROOM - 1)
            assert "do not fit" in caplog.text
        caplog.clear()
        assert not any(isinstance(module, StoredBlock) for module in fits.modules())
        assert all(isinstance(block, StoredBlock) for block in streamed.encoder.block)
        monkeypatch.setattr("c2r.pipeline.load_text_encoder", lambda *args, loaded=streamed: loaded)
        embeds = encode_prompts(folder, prompts, "cpu", dtype)
        monkeypatch.undo()
        assert len(embeds) == len(prompts)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(embeds, expected))
        assert not torch.equal(embeds[0], embeds[1])
