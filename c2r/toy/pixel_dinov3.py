"""A DINOv3 whose features are the pixels themselves: a planted leak.

With it as the frozen extractor, the control of a real clip is a copy of its target: phase 2 can copy the look and need
not learn the layout. The study uses it to test that validation reports such a leak.
"""

import json
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

PATCH_SIZE = 16


def write_pixel_dinov3(folder: str | Path) -> Path:
    """Write a DINOv3ViT whose patch embedding is the identity and whose only layer adds nothing.

    A patch feature holds the patch's 16·16·3 pixels after the model's last LayerNorm: everything but the patch's mean
    and contrast.

    Args:
        folder: gets config.json, model.safetensors and preprocessor_config.json.

    Returns:
        the folder.
    """
    width = 3 * PATCH_SIZE**2
    config = DINOv3ViTConfig(
        patch_size=PATCH_SIZE,
        hidden_size=width,
        intermediate_size=PATCH_SIZE,
        num_hidden_layers=1,
        num_attention_heads=12,
        num_register_tokens=0,
        layerscale_value=0.0,
    )
    model = DINOv3ViTModel(config).eval()
    projection = model.embeddings.patch_embeddings
    with torch.no_grad():
        projection.weight.copy_(torch.eye(width).view(width, 3, PATCH_SIZE, PATCH_SIZE))
        projection.bias.zero_()
    folder = Path(folder)
    model.save_pretrained(folder)
    preprocessor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder
