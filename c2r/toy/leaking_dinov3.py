"""Two DINOv3 whose features show the look: planted leaks.

With pixels as features the control of a real clip is a copy of its target: phase 2 can copy the look and need not
learn the layout. Features of early layers show the look beside the layout, as features of another extractor may. The
study uses both to test that validation reports a leak, and what a projection of the features does to it.
"""

import json
import shutil
from pathlib import Path

import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

PATCH_SIZE = 16
#: Layers of the toy's DINOv3, of four, whose features show the look.
NUM_EARLY_LAYERS = 2


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


def write_early_dinov3(folder: str | Path, dinov3: str | Path) -> Path:
    """Write the first NUM_EARLY_LAYERS layers of a DINOv3ViT, with its last LayerNorm.

    Args:
        folder: gets config.json, model.safetensors and preprocessor_config.json.
        dinov3: folder of the whole model.

    Returns:
        the folder.
    """
    folder = Path(folder)
    whole = DINOv3ViTModel.from_pretrained(dinov3)
    config = {name: value for name, value in whole.config.to_dict().items() if not name.startswith(("out_", "stage_"))}
    model = DINOv3ViTModel(DINOv3ViTConfig(**config | {"num_hidden_layers": NUM_EARLY_LAYERS}))
    weights = whole.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    model.save_pretrained(folder)
    shutil.copy(Path(dinov3, "preprocessor_config.json"), folder)
    return folder
