"""Tiny models of the real classes, with random weights, and inputs for them."""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import (
    DINOv3ViTConfig,
    DINOv3ViTModel,
    PreTrainedTokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer

LATENT_CHANNELS = 4
TEXT_DIM = 24
FEATURE_DIM = 32
PROMPT_LENGTH = 16
WORDS = "a the street city rain night dusk red brick people three two cars on and with".split()  # noqa: SIM905


def tiny_transformer(seed=0, **overrides):
    """WanTransformer3DModel of width 24, 4 layers."""
    config = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": LATENT_CHANNELS,
        "out_channels": LATENT_CHANNELS,
        "text_dim": TEXT_DIM,
        "freq_dim": 16,
        "ffn_dim": 48,
        "num_layers": 4,
        "rope_max_seq_len": 64,
    }
    torch.manual_seed(seed)
    return WanTransformer3DModel(**config | overrides)


def tiny_c2r_transformer(control_layers=2, control_stride=1, trained=False, seed=0, **overrides):
    """C2RTransformer on a `tiny_transformer`; `trained` gives its projectors random weights instead of zeros."""
    transformer = tiny_transformer(seed, **overrides)
    controlnet = C2RControlNet.from_transformer(transformer, control_layers, control_stride, FEATURE_DIM)
    if trained:
        for block in controlnet.control_blocks:
            torch.nn.init.normal_(block.projector[2].weight)
            torch.nn.init.normal_(block.projector[2].bias)
    return C2RTransformer(transformer, controlnet)


def tiny_inputs(batch_size=2, latent_frames=2, height=48, width=32, prompt_length=7, dtype=torch.float32, seed=1):
    """noisy_latents, timesteps, prompt_embeds and control_features for a video of height x width pixels."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        draw(batch_size, LATENT_CHANNELS, latent_frames, height // 8, width // 8),
        1000 * torch.rand(batch_size, generator=generator),
        draw(batch_size, prompt_length, TEXT_DIM),
        draw(batch_size, 4 * (latent_frames - 1) + 1, height // 16, width // 16, FEATURE_DIM),
    )


def tiny_vae(seed=0):
    """AutoencoderKLWan with Wan's factors, 8x in space and 4x in time, and latent statistics other than 0 and 1."""
    torch.manual_seed(seed)
    vae = AutoencoderKLWan(
        base_dim=4,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[0.5, 1.5, 2.0, 1.0],
    )
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("weight"):
                parameter.mul_(2)  # otherwise all latents decode to nearly the same picture
    return vae.eval()


def tiny_text_encoder(seed=0):
    """UMT5 encoder of width 24, one layer."""
    torch.manual_seed(seed)
    config = UMT5Config(vocab_size=64, d_model=TEXT_DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return UMT5EncoderModel(config).eval()


def tiny_tokenizer():
    """A word-level tokenizer that ends every prompt with </s>, as UMT5's does."""
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PROMPT_LENGTH,
    )


def tiny_dinov3(seed=0, patch_size=16):
    """DINOv3ViTModel of width 32, two layers, four registers."""
    torch.manual_seed(seed)
    config = DINOv3ViTConfig(
        patch_size=patch_size,
        hidden_size=FEATURE_DIM,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_register_tokens=4,
        image_size=64,
    )
    return DINOv3ViTModel(config).eval()


def save_tiny_pipeline(folder):
    """Write a Diffusers pipeline folder of tiny random models; returns the folder."""
    pipeline = WanPipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=tiny_text_encoder(),
        vae=tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny_transformer(),
    )
    pipeline.save_pretrained(folder)
    return folder


def save_tiny_dinov3(folder):
    """Write a DINOv3 folder with a preprocessor_config.json of ImageNet's mean and std; returns the folder."""
    tiny_dinov3().save_pretrained(folder)
    preprocessor = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    (Path(folder) / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
