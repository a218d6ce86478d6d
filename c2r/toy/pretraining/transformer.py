"""The toy's Wan transformer, and the text encoder that it is trained with."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from c2r import flow_matching
from c2r.models.vae import encode_frames
from c2r.toy import city
from c2r.toy.pretraining.stage import HELD_OUT, fit
from c2r.toy.pretraining.vae import LATENT_CHANNELS

TEXT_DIM, PROMPT_LENGTH = 64, 16


def make_text_encoder(folder: Path):
    """Write a UMT5 with random weights and a word-level tokenizer: enough to distinguish the captions."""
    scenes = [city.make_scene(seed) for seed in range(500)]
    captions = (city.caption(scene, look) for scene in scenes for look in city.LOOKS)
    words = {word for caption in captions for word in caption.replace(",", " , ").split()}
    vocab = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *sorted(words)])}
    tokenizer = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", vocab["</s>"])])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        model_max_length=PROMPT_LENGTH,
    ).save_pretrained(folder / "tokenizer")
    torch.manual_seed(1)
    config = UMT5Config(vocab_size=len(vocab), d_model=TEXT_DIM, d_kv=16, d_ff=128, num_layers=2, num_heads=4)
    UMT5EncoderModel(config).half().save_pretrained(folder / "text_encoder")


@torch.no_grad()
def encode_scenes(
    work_dir: Path,
    clips: np.ndarray,
    seeds: Sequence[int],
    vae: AutoencoderKLWan,
    text_encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Encode the three looks of each scene and their captions.

    Returns:
        normalised latents (n, 3, C, T, h, w), prompt embeddings (n, 3, L, D), those of the empty prompt (L, D).
    """
    path = work_dir / f"latents_{len(clips)}.safetensors"
    if not path.exists():
        rows = [encode_frames(vae, torch.from_numpy(clip.copy()).movedim(-1, 2))[0] for clip in clips]
        save_file({"latents": torch.stack(rows).half()}, work_dir / "latents.part")
        (work_dir / "latents.part").rename(path)
    latents = load_file(path)["latents"]

    def embed(prompts):
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        hidden = text_encoder(tokens.input_ids, tokens.attention_mask).last_hidden_state
        return hidden * tokens.attention_mask[..., None]

    captions = [[city.caption(city.make_scene(seed), look) for look in city.LOOKS] for seed in seeds]
    return latents, torch.stack([embed(row) for row in captions]), embed([""])[0]


def train_base(
    folder: Path,
    latents: torch.Tensor,
    prompt_embeds: torch.Tensor,
    empty_prompt: torch.Tensor,
    work_dir: Path,
    steps: int,
    steps_without_real: int,
    shift: float = 3.0,
):
    """Train a small WanTransformer3DModel on all three looks, a third each, with their captions.

    The last steps leave the real look out, so that phase 1 has something to adapt.

    Args:
        folder: gets the model.
        latents, prompt_embeds, empty_prompt: see `encode_scenes`.
        steps: on all looks.
        steps_without_real: further steps, on the coarse and the CG look.
        shift: of the noise levels.
    """
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=40,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_DIM,
        freq_dim=64,
        ffn_dim=480,
        num_layers=8,
        rope_max_seq_len=64,
    )
    transformer.compile(dynamic=False)  # by a C++ compiler; a quarter faster on two cores
    train = len(latents) - HELD_OUT

    def loss_of(clean, prompts, u, generator):
        noise = torch.randn(clean.shape, generator=generator)
        sigmas = flow_matching.shift_sigmas(u, shift)
        noisy_latents = flow_matching.add_noise(clean, noise, sigmas)
        timesteps = flow_matching.timesteps_from_sigmas(sigmas)
        velocity_pred = transformer(noisy_latents, timesteps, prompts).sample
        return flow_matching.velocity_loss(velocity_pred, flow_matching.velocity_target(clean, noise)).mean()

    def draw_loss(step, batch=16, num_looks=3):
        generator = torch.Generator().manual_seed(step)
        i = torch.randint(train, (batch,), generator=generator)
        look = torch.randint(num_looks, (batch,), generator=generator)
        prompts = prompt_embeds[i, look].clone()
        prompts[torch.rand(batch, generator=generator) < 0.1] = empty_prompt
        u = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        return loss_of(latents[i, look].float(), prompts, u, generator)

    @torch.no_grad()
    def on_log():
        u = torch.linspace(0.05, 0.95, HELD_OUT)
        held_out = ((latents[train:, look].float(), prompt_embeds[train:, look]) for look in range(3))
        losses = [loss_of(*clip, u, torch.Generator().manual_seed(1)).item() for clip in held_out]
        return "held-out " + ", ".join(f"{look} {loss:.4f}" for look, loss in zip(city.LOOKS, losses))

    fit("base", transformer, draw_loss, steps, 2e-3, work_dir, on_log, log_every=100)
    without_real = partial(draw_loss, num_looks=city.LOOKS.index("real"))
    fit("base_without_real", transformer, without_real, steps_without_real, 1e-3, work_dir, on_log, log_every=50)
    transformer.half().save_pretrained(folder)
