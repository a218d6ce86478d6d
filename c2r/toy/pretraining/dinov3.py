"""Train the toy's DINOv3."""

import json
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import nn
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from c2r.toy.pretraining.scenes import HEIGHT, NUM_FRAMES, WIDTH
from c2r.toy.pretraining.stage import HELD_OUT, fit

IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train_dinov3(folder: Path, clips: np.ndarray, kinds: np.ndarray, work_dir: Path, steps: int):
    """Train a small DINOv3ViT whose features agree between the three looks of a frame and distinguish people.

    This replaces the invariance to the domain that real DINOv3 has from its own pretraining.

    Args:
        folder: gets the model.
        clips, kinds: see `render_scenes`.
        work_dir: gets the state of the stage.
        steps: number of optimizer steps.
    """
    torch.manual_seed(0)
    model = DINOv3ViTModel(
        DINOv3ViTConfig(
            patch_size=16,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=4,
            num_attention_heads=3,
            num_register_tokens=4,
            image_size=HEIGHT,
            pos_embed_rescale=None,
        )
    ).train()
    cells = 8  # each 16 x 16 patch predicts the kinds of 8 x 8 cells
    head = nn.Linear(96, 4 * cells * cells)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
    train = len(clips) - HELD_OUT
    weights = torch.tensor([1.0, 1.0, 1.0, 4.0]).view(1, 4, 1, 1)

    def patches(frames):
        pixel_values = (torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2).float() / 255 - mean) / std
        return model(pixel_values).last_hidden_state[:, 1 + model.config.num_register_tokens :]

    def targets(maps):
        one_hot = F.one_hot(torch.from_numpy(np.stack(maps)).long(), 4).permute(0, 3, 1, 2).float()
        return F.avg_pool2d(one_hot, 16 // cells)

    def predict(features):
        grid = rearrange(head(features), "b (h w) c -> b c h w", w=WIDTH // 16)
        return F.pixel_shuffle(grid, cells).log_softmax(1)

    def draw_loss(step):
        rng = np.random.default_rng((0, step))
        first, second, maps = [], [], []
        for _ in range(8):
            a, b = rng.choice(3, 2, replace=False)
            i, t, flip = rng.integers(train), rng.integers(NUM_FRAMES), rng.choice((-1, 1))
            first.append(clips[i, a, t][:, ::flip])
            second.append(clips[i, b, t][:, ::flip])
            maps.append(kinds[i, t][:, ::flip])
        features = patches(first + second)
        target = targets(maps).repeat(2, 1, 1, 1)
        classify = -(target * predict(features) * weights).sum(1).mean()
        return classify + 2 * F.mse_loss(features[:8], features[8:])

    fit("dinov3", nn.ModuleList([model, head]), draw_loss, steps, 2e-3, work_dir, log_every=250)
    model.eval().half().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}))
