"""Three DINOv3 whose features show the look: planted leaks.

With pixels as features the control of a real clip is a copy of its target: phase 2 can copy the look and need not
learn the layout. Features of early layers show the look beside the layout, as features of another extractor may. The
third adds the look to features that hide it, in one direction of their mean over a frame. The study uses them to test
that validation reports a leak, and what a projection of the features does to it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from c2r.toy import city

PATCH_SIZE = 16
#: Layers of the toy's DINOv3, of four, whose features show the look.
NUM_EARLY_LAYERS = 2
#: Scenes on which the look is added to features; in no other part of the toy.
LOOK_SCENES = range(9_000_000, 9_000_048)
LOOK_STEPS = 200
#: Weight of the squared distance that a frame's mean feature has moved; without it the looks move apart without end.
MEAN_WEIGHT = 10


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


def write_look_dinov3(folder: str | Path, dinov3: str | Path) -> Path:
    """Write a DINOv3ViT that differs from another one in the mean of its features over a frame, which tells the look.

    It is trained from the other one: what tells places of a frame apart stays, and a linear map of the mean tells the
    three looks apart.

    Args:
        folder: gets config.json, model.safetensors and preprocessor_config.json.
        dinov3: folder of the other model.

    Returns:
        the folder.
    """
    folder = Path(folder)
    teacher, model = (DINOv3ViTModel.from_pretrained(dinov3, dtype=torch.float32) for _ in range(2))
    preprocessor = json.loads(Path(dinov3, "preprocessor_config.json").read_text())
    mean, std = (torch.tensor(preprocessor[f"image_{name}"]).view(3, 1, 1) for name in ("mean", "std"))
    renderings = (city.render(city.make_scene(seed)) for seed in LOOK_SCENES)
    clips = np.stack([[rendering[look] for look in city.LOOKS] for rendering in renderings])  # (n, 3, F, H, W, 3)
    torch.manual_seed(0)
    head = nn.Linear(model.config.hidden_size, len(city.LOOKS))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=1e-3)

    def features(network, pixel_values):
        patches = network(pixel_values).last_hidden_state[:, 1 + network.config.num_register_tokens :]
        means = patches.mean(1)
        return patches - means[:, None], means

    for step in range(LOOK_STEPS):
        rng = np.random.default_rng((0, step))
        looks = np.arange(18) % len(city.LOOKS)
        frames = np.stack([clips[rng.integers(len(clips)), look, rng.integers(clips.shape[2])] for look in looks])
        pixel_values = (torch.from_numpy(frames).permute(0, 3, 1, 2) / 255 - mean) / std
        with torch.no_grad():
            places, old_means = features(teacher, pixel_values)
        new_places, means = features(model, pixel_values)
        loss = F.mse_loss(new_places, places) / places.square().mean() + MEAN_WEIGHT * F.mse_loss(means, old_means)
        loss = loss + F.cross_entropy(head(means), torch.from_numpy(looks))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.half().save_pretrained(folder)
    shutil.copy(Path(dinov3, "preprocessor_config.json"), folder)
    return folder
