"""Train the toy's base models from scratch; they stand for the Wan and DINOv3 of a real run.

`python -m c2r.toy --train` runs the stages in order and writes `weights/`. A stage whose weights exist is skipped, an
interrupted one continues. `weights/README.md` describes the shipped weights.
"""

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from c2r.toy.pretraining.dinov3 import train_dinov3
from c2r.toy.pretraining.people_finder import train_people_finder
from c2r.toy.pretraining.scenes import render_scenes
from c2r.toy.pretraining.transformer import encode_scenes, make_text_encoder, train_base
from c2r.toy.pretraining.vae import train_vae


def train(folder: Path, work_dir: Path, num_scenes: int = 3000, base_scenes: int = 2000):
    """Train the models that are missing.

    Args:
        folder: gets the models.
        work_dir: keeps renderings, latents, and the state of the stage that is running.
        num_scenes: rendered for the VAE, DINOv3 and the people finder.
        base_scenes: the last of them, for the transformer.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    model, dinov3 = folder / "model", folder / "dinov3"

    def missing(part):
        return not any(part.glob("*.safetensors"))

    def finished(*stages):
        for stage in stages:
            (work_dir / f"{stage}.pt").unlink(missing_ok=True)

    clips, kinds, seeds = render_scenes(work_dir, num_scenes)
    if missing(model / "vae"):
        for latents in work_dir.glob("latents_*"):  # of another VAE
            latents.unlink()
        train_vae(model / "vae", clips, kinds, work_dir, steps=4500)
        finished("vae")
    if missing(model / "text_encoder"):
        make_text_encoder(model)
    if missing(dinov3):
        train_dinov3(dinov3, clips, kinds, work_dir, steps=2500)
        finished("dinov3")
    vae = AutoencoderKLWan.from_pretrained(model / "vae", torch_dtype=torch.float32)
    if missing(folder / "people_finder"):
        train_people_finder(folder / "people_finder", clips, kinds, vae, work_dir, steps=500)
        finished("people")
    if missing(model / "transformer"):
        text_encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder", dtype=torch.float32)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model / "tokenizer")
        train_base(
            model / "transformer",
            *encode_scenes(work_dir, clips[-base_scenes:], seeds[-base_scenes:], vae, text_encoder, tokenizer),
            work_dir,
            steps=6000,
            steps_without_real=300,
        )
        finished("base", "base_without_real")
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(model / "scheduler")
    index = {
        "_class_name": "WanPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": [None, None],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    (model / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
