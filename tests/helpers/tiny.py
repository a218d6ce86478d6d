"""Models of the real classes at tiny size with random weights, as the tests use them."""

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


def tiny_vae(seed=0):
    """AutoencoderKLWan with Wan's factors, 8x in space and 4x in time; its latent statistics are not trivial."""
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
                parameter.mul_(2)  # or all latents decode to nearly the same picture
    return vae.eval()


def tiny_text_encoder(seed=0):
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
