"""A DINOv3 that hides nothing: its features are the pixels themselves.

With it as the frozen extractor a real clip's control is a copy of its target, so phase 2 can copy the look and learn
no layout. Studies plant such a leak to see whether validation calls it out.
"""

import json
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

PATCH_SIZE = 16


def write_pixel_dinov3(folder):
    """Write a DINOv3ViT whose patch embedding is the identity and whose only layer adds nothing.

    A patch feature is the patch's 16·16·3 pixels after the model's last LayerNorm: all of the patch but its mean and
    its contrast.

    Args:
        folder: where; config.json, model.safetensors and preprocessor_config.json are written into it.

    Returns:
        the folder, as a `Path`.
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
