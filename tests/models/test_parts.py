"""Parts around the transformer: the text encoder on a device that is too small for it."""

import logging

import torch
from transformers import UMT5Config, UMT5EncoderModel

from c2r.models.offloading import StoredBlock
from c2r.models.parts import TEXT_ENCODER_ROOM, load_text_encoder
from c2r.pipeline import encode_prompts
from tests.helpers.tiny import TEXT_DIM, save_tiny_pipeline

CPU = torch.device("cpu")


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
