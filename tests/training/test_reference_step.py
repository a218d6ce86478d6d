"""One optimizer step of each training script against a reference written out by hand."""

import hashlib
import math
from itertools import islice

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from torch.optim.optimizer import register_optimizer_step_pre_hook

import train_phase1
import train_phase2
from c2r.data.mixture import read_mixture
from c2r.encoding.dataset import ClipDataset
from c2r.models.adversary import DomainClassifier
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.options import PHASE1, PHASE2
from c2r.options.shared import clip_settings
from c2r.sampler import MixedCGRealSampler
from c2r.training.augmentation import augment_control_frames
from tests.helpers.commands import SIZE
from tests.helpers.scripts import run_script
from tests.helpers.tiny import LATENT_CHANNELS

BATCH, MICRO_STEPS, SEED, SHIFT = 2, 3, 7, 2.5
PROMPT_DROPOUT = CONTROL_DROPOUT = 0.4
CONTROL_AUGMENTATION = 0.5
CONDITIONING_SCALE, CG_RATIO, REAL_WEIGHT, ADVERSARIAL_WEIGHT = 0.7, 0.4, 2.5, 0.3
MAX_GRAD_NORM = 0.05  # below the norms of these gradients, so that clipping acts
OWN_GRADIENT_SCALE = 0.01  # of the domain classifier


def record_steps(script, command, argv):
    """Run a script in this process; return its options and, for each step, (parameters, clipped gradients)."""
    steps = []

    def record(optimizer, args, kwargs):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if parameters[0].is_meta:
            return  # the estimate of the preflight
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in parameters]
        steps.append(([p.detach().clone() for p in parameters], grads))

    hook = register_optimizer_step_pre_hook(record)
    try:
        args = run_script(script, command, argv)
    finally:
        hook.remove()
    return args, steps


def shared_options(tiny_models, small_datasets, out):
    options = {
        "pretrained_model_name_or_path": tiny_models / "pipeline",
        "real_dataset": small_datasets / "real",
        "output_dir": out,
        "train_batch_size": BATCH,
        "gradient_accumulation_steps": MICRO_STEPS,
        "max_train_steps": 2,
        "seed": SEED,
        "dataloader_num_workers": 0,
        "mixed_precision": "no",
        "learning_rate": 1e-2,
        "lr_scheduler": "constant",
        "flow_shift": SHIFT,
        "prompt_dropout": PROMPT_DROPOUT,
        "max_grad_norm": MAX_GRAD_NORM,
        "num_validation_clips": 1,
        "report_to": "none",
        **SIZE,
    }
    return [f"--{name}={value}" for name, value in options.items()]


# ----------------------------------------------------------------------------------------------- the step, by hand


def generator_of(*parts):
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def uniform_numbers(numbers):
    """One number per stratum of the optimizer step's six samples; those of the samples with these numbers."""
    count = BATCH * MICRO_STEPS
    generator = generator_of(SEED, "sigmas", numbers[0] // count * count)
    strata = torch.randperm(count, generator=generator)
    uniform = (strata + torch.rand(count, generator=generator, dtype=torch.float64)) / count
    return uniform[[number % count for number in numbers]]


def shifted(sigmas):
    sigmas = sigmas.clamp(min=1e-3)
    return (SHIFT * sigmas / (1 + (SHIFT - 1) * sigmas)).float()


def micro_batches(sampler):
    """Yield (indices, numbers): what a loop reads, and which samples of the run they are."""
    for indices in sampler:
        yield indices, sampler.mark_consumed()


def noisy_samples(items, sigmas, numbers, empty_prompt):
    """Yield, for each sample, (noisy latents, velocity, prompt, is its control dropped)."""
    for number, item, sigma in zip(numbers, items, sigmas):
        generator, mean = generator_of(SEED, "sample", number), item["latents_mean"]
        spread, noise = (torch.randn(mean.shape, generator=generator) for _ in range(2))
        drop_prompt, drop_control = (torch.rand((), generator=generator).item() for _ in range(2))
        latents = mean + (item["latents_logvar"] / 2).exp() * spread
        prompt = empty_prompt if drop_prompt < PROMPT_DROPOUT else item["prompt_embeds"]
        yield (1 - sigma) * latents + sigma * noise, noise - latents, prompt, drop_control < CONTROL_DROPOUT


def control_of(item, number):
    """Return the control of a sample, (F, 3, H, W) in [0, 1], and whether its look is altered."""
    frames, generator = item["control_frames"].float() / 255, generator_of(SEED, "augmentation", number)
    altered = torch.rand((), generator=generator).item() < CONTROL_AUGMENTATION and not item["domain"]
    return augment_control_frames(frames, generator) if altered else frames, altered


def clip_together(grads):
    norm = math.sqrt(sum(grad.double().square().sum().item() for grad in grads))
    assert norm > MAX_GRAD_NORM
    return [grad * (MAX_GRAD_NORM / (norm + 1e-6)) for grad in grads]


def fill(modules, values):
    """Put values into the parameters of modules, in order; return the parameters."""
    parameters = [p for module in modules for p in module.parameters()]
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return parameters


def assert_same_gradients(found, expected):
    """Every tensor agrees to 1e-5 of its norm, and all together to 1e-6."""
    error = norm = 0.0
    for a, b in zip(found, expected, strict=True):
        difference, size = (a - b).double().norm().item(), b.double().norm().item()
        assert difference <= 1e-5 * size + 1e-9
        error, norm = error + difference**2, norm + size**2
    assert math.sqrt(error / norm) < 1e-6


# ------------------------------------------------------------------------------------------------------------ phase 1


def test_a_step_of_phase_1(tiny_models, small_datasets, tmp_path):
    """Weight σ⁻² of the loss, at most 5: `--weighting_scheme sigma_sqrt`."""
    argv = [*shared_options(tiny_models, small_datasets, tmp_path), "--weighting_scheme=sigma_sqrt"]
    args, steps = record_steps(train_phase1, PHASE1, argv)
    real = read_mixture(args.real_dataset, "real", clip_settings(args))
    dataset = ClipDataset(real.train, clip_settings(args))
    sampler = MixedCGRealSampler(dataset, [], cg_ratio=0, batch_size=BATCH, seed=SEED)
    transformer = WanTransformer3DModel.from_pretrained(tiny_models / "pipeline/transformer").train()
    batches = micro_batches(sampler)
    for values, grads in steps:
        parameters = fill([transformer], values)
        loss = 0
        for indices, numbers in islice(batches, MICRO_STEPS):
            items = [dataset[index] for index in indices]
            sigmas = shifted(uniform_numbers(numbers))
            samples = noisy_samples(items, sigmas, numbers, dataset.empty_prompt_embeds)
            for sigma, (noisy, velocity, prompt, _) in zip(sigmas, samples):
                predicted = transformer(noisy[None], 1000 * sigma[None], prompt[None], return_dict=False)[0][0]
                loss = loss + min(sigma**-2, 5) * (predicted - velocity).square().mean() / (BATCH * MICRO_STEPS)
        assert_same_gradients(grads, clip_together(torch.autograd.grad(loss, parameters)))


# ------------------------------------------------------------------------------------------------------------ phase 2


def control_tokens(adapter, features):
    """(F, h, w, Dd) features of a clip to (N, D) tokens: depthwise kernels of 9 frames, every fourth frame."""
    num_frames = len(features)
    kernel = adapter.temporal_downsample.conv.weight[:, 0, :, 0, 0]  # (Dd, 9)
    frames = []
    for centre in range(0, num_frames, 4):
        near = [(k, centre + k - 4) for k in range(9) if 0 <= centre + k - 4 < num_frames]
        frames.append(sum(kernel[:, k] * features[frame] for k, frame in near))
    tokens = torch.stack(frames).flatten(0, 2)  # (T·h·w, Dd)
    tokens = F.layer_norm(tokens, tokens.shape[-1:], adapter.norm.weight, adapter.norm.bias, adapter.norm.eps)
    return tokens @ adapter.proj.weight.T + adapter.proj.bias


def joined_forward(backbone, controlnet, noisy, sigma, prompt, features):
    """Velocity of one sample: c' = CB(c), x' = B(x) + scale · projector(c')."""
    noisy, channels = noisy[None], noisy.shape[0]
    rotary = backbone.rope(noisy)
    tokens = backbone.patch_embedding(noisy)
    frames, height, width = tokens.shape[2:]
    x = tokens.flatten(2).transpose(1, 2)
    time, modulation, text, _ = backbone.condition_embedder(1000 * sigma[None], prompt[None], None)
    shared = (text, modulation.unflatten(1, (6, -1)), rotary)
    c = control_tokens(controlnet.control_adapter, features)[None]
    blocks = dict(zip(controlnet.config.injection_layers, controlnet.control_blocks))
    for number, block in enumerate(backbone.blocks):
        x = block(x, *shared)
        if number in blocks:
            c = blocks[number].block(c, *shared)
            first, _, last = blocks[number].projector
            hidden = F.gelu(c @ first.weight.T + first.bias)
            x = x + CONDITIONING_SCALE * (hidden @ last.weight.T + last.bias)
    shift, scale = (backbone.scale_shift_table + time[:, None]).unbind(1)
    x = backbone.proj_out(backbone.norm_out(x) * (1 + scale[:, None]) + shift[:, None])[0]  # (N, 1·2·2·C)
    x = x.reshape(frames, height, width, 2, 2, channels).permute(5, 0, 1, 3, 2, 4)
    return x.reshape(channels, frames, 2 * height, 2 * width)


def domain_logit(classifier, latents, sigma):
    """Logit of CG of one sample's latents; every kernel has norm 1."""

    def unit(convolution, x):
        weight = convolution.weight / convolution.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1)
        return F.conv3d(x, weight, convolution.bias, convolution.stride, convolution.padding)

    frequencies = torch.exp(-math.log(10_000) * torch.arange(16) / 15)
    angles = 1000 * sigma * frequencies
    embedding = torch.cat([angles.sin(), angles.cos()])
    scale, shift = classifier.sigma_modulation(embedding)[:, None, None, None].chunk(2)
    first, *others = classifier.convolutions
    x = F.silu(unit(first, latents[None]) * (1 + scale) + shift) / 0.596
    for convolution in others:
        x = F.silu(unit(convolution, x)) / 0.596
    return unit(classifier.head, x.mean((2, 3, 4), keepdim=True)).squeeze()


@pytest.fixture
def phase2_steps(tiny_models, small_datasets, tmp_path):
    options = {
        "resume_backbone_from": tiny_models / "pipeline",
        "cg_dataset": small_datasets / "cg",
        "dinov3": tiny_models / "dinov3",
        "control_layers": 2,
        "control_stride": 2,
        "cg_ratio": CG_RATIO,
        "conditioning_scale": CONDITIONING_SCALE,
        "control_dropout": CONTROL_DROPOUT,
        "control_augmentation": CONTROL_AUGMENTATION,
        "real_weight": REAL_WEIGHT,
        "adversarial_weight": ADVERSARIAL_WEIGHT,
        "num_samples": 0,
        "weighting_scheme": "logit_normal",
        "logit_mean": 0.5,
        "logit_std": 1.5,
    }
    argv = shared_options(tiny_models, small_datasets, tmp_path)
    return record_steps(train_phase2, PHASE2, [*argv, *(f"--{name}={value}" for name, value in options.items())])


def test_a_step_of_phase_2(phase2_steps, tiny_models):
    """Both steps: at the first one the projectors are zero, and the blocks below them have no gradient yet."""
    args, steps = phase2_steps
    settings = clip_settings(args)
    real, cg = (
        ClipDataset(read_mixture(addresses, domain, settings).train, settings, with_control=True)
        for addresses, domain in ((args.real_dataset, "real"), (args.cg_dataset, "cg"))
    )
    sampler = MixedCGRealSampler(real, cg, cg_ratio=CG_RATIO, batch_size=BATCH, seed=SEED)
    dinov3 = DINOv3FeatureExtractor.from_pretrained(tiny_models / "dinov3", torch.float32)
    backbone = WanTransformer3DModel.from_pretrained(tiny_models / "pipeline/transformer").requires_grad_(False)
    controlnet = C2RControlNet.from_transformer(backbone, 2, 2, feature_dim=dinov3.feature_dim)
    classifier = DomainClassifier(LATENT_CHANNELS)
    seen = set()
    batches = micro_batches(sampler)
    for values, grads in steps:
        parameters = fill([controlnet, classifier], values)
        loss, domain_loss, reversed_loss = 0, 0, 0
        for indices, numbers in islice(batches, MICRO_STEPS):
            items = [real[index] if index < len(real) else cg[index - len(real)] for index in indices]
            sigmas = shifted(torch.sigmoid(0.5 + 1.5 * torch.special.ndtri(uniform_numbers(numbers))))
            samples = zip(numbers, noisy_samples(items, sigmas, numbers, real.empty_prompt_embeds))
            for item, sigma, (number, (noisy, velocity, prompt, dropped)) in zip(items, sigmas, samples):
                frames, altered = control_of(item, number)
                features = dinov3(frames[None])[0] * (not dropped)
                predicted = joined_forward(backbone, controlnet, noisy, sigma, prompt, features)
                weight = (1 if item["domain"] else REAL_WEIGHT) / (CG_RATIO + REAL_WEIGHT * (1 - CG_RATIO))
                loss = loss + weight * (predicted - velocity).square().mean() / (BATCH * MICRO_STEPS)
                seen.add((item["domain"], dropped, altered))
                if dropped:
                    continue
                latents = noisy - sigma * predicted
                target = torch.tensor(float(item["domain"]))
                share = CG_RATIO if item["domain"] else 1 - CG_RATIO

                def entropy_of(latents, sigma=sigma, target=target, share=share):
                    logit = domain_logit(classifier, latents, sigma)
                    entropy = F.binary_cross_entropy_with_logits(logit, target)
                    return entropy / (2 * share) / (BATCH * MICRO_STEPS)

                domain_loss = domain_loss + entropy_of(latents.detach())
                if item["domain"]:  # real samples keep their look
                    leaf = latents.detach().requires_grad_()
                    (grad,) = torch.autograd.grad(entropy_of(leaf), leaf)
                    reversed_loss = reversed_loss - ADVERSARIAL_WEIGHT * (grad * latents).sum()
        control_grads = torch.autograd.grad(loss + reversed_loss, parameters[: -len(list(classifier.parameters()))])
        own_grads = torch.autograd.grad(OWN_GRADIENT_SCALE * domain_loss, [*classifier.parameters()])
        assert_same_gradients(grads, clip_together([*control_grads, *own_grads]))
    assert {(0, True), (0, False), (1, False)} <= {kind[:2] for kind in seen}
    assert {(0, False, True), (0, False, False)} <= seen
    assert all(grad.norm() > 0 for grad in steps[1][1])
