"""Train the toy's base models from scratch; they stand for the Wan and DINOv3 of a real run.

`python -m c2r.toy --train` runs the stages in order and writes `weights/`. A stage whose weights exist is skipped, an
interrupted one continues. `weights/README.md` describes the shipped weights.
"""

import hashlib
import json
import logging
import multiprocessing
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from einops import rearrange
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import nn
from torch.nn import functional as F
from transformers import DINOv3ViTConfig, DINOv3ViTModel, PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

from c2r import InputError, flow_matching
from c2r.models.vae import encode_frames
from c2r.toy import city
from c2r.toy.layout import PeopleFinder

NUM_FRAMES, HEIGHT, WIDTH = 9, 96, 160
LATENT_CHANNELS, TEXT_DIM, PROMPT_LENGTH = 16, 64, 16
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HELD_OUT = 32  # the last scenes, on which no stage trains

logger = logging.getLogger(__name__)


def _render_one(seed):
    clips = city.render(city.make_scene(seed), num_frames=NUM_FRAMES, height=HEIGHT, width=WIDTH)
    return np.stack([clips[look] for look in city.LOOKS]), clips["kinds"]


def render_scenes(
    work_dir: Path, num_scenes: int, first_seed: int = 10_000_000
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Render scenes once into memory-mapped files, whose names change with the renderer.

    Returns:
        clips (n, 3 looks, F, H, W, 3) uint8, kinds (n, F, H, W) uint8, and the seeds of the scenes.
    """
    seeds = range(first_seed, first_seed + num_scenes)
    key = f"{num_scenes}_{_hash(Path(city.__file__))}"
    clips_path, kinds_path = work_dir / f"clips_{key}.npy", work_dir / f"kinds_{key}.npy"
    if not kinds_path.exists():
        shape = (num_scenes, len(city.LOOKS), NUM_FRAMES, HEIGHT, WIDTH, 3)
        clips = np.lib.format.open_memmap(work_dir / "clips.part.npy", "w+", np.uint8, shape)
        kinds = np.empty((num_scenes, NUM_FRAMES, HEIGHT, WIDTH), np.uint8)
        with multiprocessing.Pool() as pool:
            for i, (clip, kind) in enumerate(pool.imap(_render_one, seeds, chunksize=8)):
                clips[i], kinds[i] = clip, kind
            pool.close()
            pool.join()
        clips.flush()
        (work_dir / "clips.part.npy").rename(clips_path)
        np.save(work_dir / "kinds.part.npy", kinds)
        (work_dir / "kinds.part.npy").rename(kinds_path)
    return np.load(clips_path, mmap_mode="r"), np.load(kinds_path), list(seeds)


def _hash(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def fit(
    name: str,
    module: nn.Module,
    draw_loss: Callable[[int], torch.Tensor],
    steps: int,
    learning_rate: float,
    work_dir: Path,
    on_log: Callable[[], str] | None = None,
    log_every: int = 100,
):
    """Minimise a loss by AdamW in one cycle of the learning rate and of beta 1, gradients clipped at norm 1.

    The state is saved in work_dir with every line of the log. An interrupted stage continues from it, and ends with
    the same weights.

    Args:
        name: of the stage, in the log and of the state's file.
        module: trained in place.
        draw_loss: takes the number of the step, from which everything random follows; returns a scalar.
        steps: number of optimizer steps.
        learning_rate: at its peak.
        work_dir: gets the state.
        on_log: returns text for the log.
        log_every: steps between two lines of the log.

    Raises:
        InputError: the state in work_dir is of another schedule.
        RuntimeError: a gradient is not finite.
    """
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.03)
    path, first, settings = work_dir / f"{name}.pt", 0, {"steps": steps, "learning_rate": learning_rate}
    if path.exists():
        state = torch.load(path, weights_only=True)
        if state["settings"] != settings:
            raise InputError(f"{path}: is of {state['settings']}, the stage now has {settings}; delete the file")
        first = state["step"]
        for part, content in ((module, "module"), (optimizer, "optimizer"), (schedule, "schedule")):
            part.load_state_dict(state[content])
        logger.info("%s continues at step %d", name, first)
    started, total = time.time(), 0.0
    for step in range(first, steps):
        loss = draw_loss(step)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, error_if_nonfinite=True)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % log_every == 0:
            line = f"{name} step {step + 1}/{steps} loss {total / log_every:.4f}, {time.time() - started:.0f} s"
            logger.info(line + (f" {on_log()}" if on_log else ""))
            total = 0.0
            parts: dict[str, Any] = {"module": module, "optimizer": optimizer, "schedule": schedule}
            contents = {content: part.state_dict() for content, part in parts.items()}
            torch.save(contents | {"step": step + 1, "settings": settings}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)


def to_pixel_values(clips: np.ndarray) -> torch.Tensor:
    """Convert (..., F, H, W, 3) uint8 to (..., 3, F, H, W) in [-1, 1]."""
    return rearrange(torch.from_numpy(np.ascontiguousarray(clips)).float() / 127.5 - 1, "... f h w c -> ... c f h w")


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio in dB of pixel values in [-1, 1]."""
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


def train_vae(folder: Path, clips: np.ndarray, kinds: np.ndarray, work_dir: Path, steps: int):
    """Train a small AutoencoderKLWan with Wan's factors: 8x in space, 4x in time, 16 channels."""
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 3],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        patch_size=2,
        in_channels=12,
        out_channels=12,
        scale_factor_spatial=8,
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )

    def draw_loss(step):
        pixel_values, people = _draw_crops(clips, kinds, np.random.default_rng((0, step)))
        posterior = vae.encode(pixel_values).latent_dist
        error = vae.decode(posterior.sample(torch.Generator().manual_seed(step))).sample - pixel_values
        error = (error.abs() + 4 * error.square()) * (1 + 2 * people)
        kl = (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean() / 2
        return error.mean() + 1e-4 * kl

    @torch.no_grad()
    def on_log():
        found = []
        for look in range(len(city.LOOKS)):
            held_out = to_pixel_values(clips[-4:, look])
            found.append(psnr(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out))
        return "held-out PSNR " + ", ".join(f"{look} {value:.2f} dB" for look, value in zip(city.LOOKS, found))

    fit("vae", vae, draw_loss, steps, 2e-3, work_dir, on_log, log_every=100)
    with torch.no_grad():
        batches = (to_pixel_values(clips[i : i + 4, 2]) for i in range(0, 120, 4))
        latents = torch.cat([vae.encode(pixel_values).latent_dist.mean for pixel_values in batches])
    vae.register_to_config(
        latents_mean=latents.mean((0, 2, 3, 4)).tolist(), latents_std=latents.std((0, 2, 3, 4)).tolist()
    )
    vae.half().save_pretrained(folder)


def _draw_crops(clips, kinds, rng, batch=4, crop=64):
    """Return random crops (B, 3, F, crop, crop) in [-1, 1] and their masks of people (B, 1, F, crop, crop) bool."""
    crops, people = [], []
    for _ in range(batch):
        # The real look gets the largest share: generated videos have it.
        i, look, flip = rng.integers(len(clips) - HELD_OUT), rng.choice(3, p=(0.15, 0.25, 0.6)), rng.choice((-1, 1))
        y, x = rng.integers(HEIGHT - crop + 1), rng.integers(WIDTH - crop + 1)
        crops.append(clips[i, look][:, y : y + crop, x : x + crop][:, :, ::flip])
        people.append(kinds[i][:, y : y + crop, x : x + crop][:, :, ::flip] == city.PERSON)
    return to_pixel_values(np.stack(crops)), torch.from_numpy(np.stack(people))[:, None]


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


def train_dinov3(folder: Path, clips: np.ndarray, kinds: np.ndarray, work_dir: Path, steps: int):
    """Train a small DINOv3ViT whose features agree between the three looks of a frame and distinguish people.

    This replaces the invariance to the domain that real DINOv3 has from its own pretraining.
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


def train_people_finder(
    folder: Path, clips: np.ndarray, kinds: np.ndarray, vae: AutoencoderKLWan, work_dir: Path, steps: int
):
    """Train the network by which the quickstart measures control: it finds people in pixels."""
    torch.manual_seed(0)
    finder = PeopleFinder()
    train = len(clips) - HELD_OUT

    @torch.no_grad()
    def decoded(clip):  # generated videos come from the VAE's decoder, so half of the examples do too
        pixel_values = to_pixel_values(clip)[None]
        return vae.decode(vae.encode(pixel_values).latent_dist.mean).sample[0]

    pool = [(to_pixel_values(clips[i, 2]), decoded(clips[i, 2]), kinds[i]) for i in range(min(train, 300))]

    def draw_loss(step):
        rng, generator = np.random.default_rng((0, step)), torch.Generator().manual_seed(step)
        frames, maps = [], []
        for _ in range(16):
            true, through_vae, kind = pool[rng.integers(len(pool))]
            t, flip = rng.integers(NUM_FRAMES), rng.random() < 0.5
            frame = (true if rng.random() < 0.5 else through_vae)[:, t]
            frame = frame + 0.1 * rng.random() * torch.randn(frame.shape, generator=generator)
            people = torch.from_numpy(kind[t] == city.PERSON).float()[None]
            frames.append(frame.flip(-1) if flip else frame)
            maps.append(people.flip(-1) if flip else people)
        target = F.avg_pool2d(torch.stack(maps), finder.cell)[:, 0]
        return F.binary_cross_entropy_with_logits(finder(torch.stack(frames)), target)

    fit("people", finder, draw_loss, steps, 4e-3, work_dir, log_every=100)
    finder.save_pretrained(folder)


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
