"""A training step on fake tensors: our models, our forward, our optimizer, and the loop's own functions around them."""

from argparse import Namespace
from dataclasses import dataclass

import torch
from diffusers import ModelMixin, WanTransformer3DModel

from c2r import flow_matching
from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs, build_backbone, build_joined
from c2r.estimation.fake_device import DEVICE, fake_device, put_on_device
from c2r.estimation.tracker import GRADIENTS, HOST, OPTIMIZER, SAVED, TEMPORARY, Recording, Tracker
from c2r.flow_matching import SigmaDensity
from c2r.models.adversary import DomainClassifier, WithAdversary, domain_loss
from c2r.training.batches import Draw
from c2r.training.optimizer import OptimizerSettings, build_optimizer
from c2r.training.precision import frozen_dtype
from c2r.training.setup import set_forward
from c2r.training.step import NoiseSettings, NoisyBatch, domain_weights, make_noisy_batch

#: Tokens of a prompt, which is padded to them.
PROMPT_TOKENS = 512


class EightBitStates(torch.optim.Optimizer):
    """The memory of bitsandbytes' AdamW8bit, whose kernels cannot run on fake tensors.

    Each moment takes one byte per number and one fp32 scale per 256 numbers; small parameters have fp32 moments.
    """

    def __init__(self, params, lr, betas, weight_decay, eps):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        """Make the states of parameters that have a gradient and no states yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and not self.state[parameter]:
                    self.state[parameter] = dict(self._states(parameter))

    def _states(self, parameter):
        count = parameter.numel()
        dtype = torch.float32 if count < 4096 else torch.uint8
        for moment in ("1", "2"):
            yield f"state{moment}", torch.zeros_like(parameter, dtype=dtype)
            if dtype == torch.uint8:
                yield f"absmax{moment}", torch.zeros(-(-count // 256), dtype=torch.float32, device=parameter.device)


@dataclass
class TrainingModels:
    """A run's models on the meta device."""

    model: torch.nn.Module  #: the one that is called
    backbone: WanTransformer3DModel
    module: ModelMixin  #: the part that trains, a domain classifier apart
    classifier: DomainClassifier | None = None

    @property
    def has_control(self) -> bool:
        """True in phase 2."""
        return self.module is not self.backbone


def build_models(args: Namespace, configs: ModelConfigs) -> TrainingModels:
    """Build the models that the scripts build; with `control_layers` the options are phase 2's.

    Raises:
        InputError: the backbone has too few blocks for the control branch.
    """
    if not hasattr(args, "control_layers"):
        backbone = build_backbone(configs.transformer, torch.float32).requires_grad_(True)
        return TrainingModels(backbone, backbone, backbone)
    joined = build_joined(
        configs,
        frozen_dtype(args.mixed_precision),
        control_layers=args.control_layers,
        control_stride=args.control_stride,
    )
    if args.adversarial_weight == 0:
        return TrainingModels(joined, joined.transformer, joined.controlnet)
    with torch.device("meta"):
        classifier = DomainClassifier(joined.transformer.config.out_channels)
    return TrainingModels(WithAdversary(joined, classifier), joined.transformer, joined.controlnet, classifier)


@dataclass
class TrainingState:
    """A run's models and optimizer on the fake device."""

    models: TrainingModels
    trainable: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: list[torch.Tensor]  #: of --ema_decay


def put_state_on_device(args: Namespace, models: TrainingModels, tracker: Tracker, device_type: str) -> TrainingState:
    """Put the models on the fake device and build the optimizer, with the states that its first step makes.

    Args:
        args: options of a training script.
        models: from `build_models`.
        tracker: of the fake device that is entered.
        device_type: see `fake_device`.
    """
    put_on_device(models.model, tracker, device_type)
    set_forward(args, models.model, models.backbone, DEVICE)
    with tracker.making(OPTIMIZER):
        optimizer = build_optimizer(
            models.module, OptimizerSettings.of(args), DEVICE, models.classifier, lambda: EightBitStates
        )
    trainable = [parameter for parameter in models.model.parameters() if parameter.requires_grad]
    with tracker.making(GRADIENTS):
        for parameter in trainable:
            parameter.grad = torch.empty_like(parameter)
    with tracker.making(OPTIMIZER):
        optimizer.step()
    optimizer.zero_grad()
    average = []
    if args.ema_decay is not None:
        with tracker.making(OPTIMIZER):
            average = [parameter.detach().clone() for parameter in models.module.parameters()]
    for parameter in trainable:
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, GRADIENTS))
    return TrainingState(models, trainable, optimizer, average)


def record_step(args: Namespace, configs: ModelConfigs, bucket: Bucket, device_type: str = "cuda") -> Recording:
    """Run an optimizer step on fake tensors; return its allocations, and the FLOPs of its last micro-step.

    Two micro-steps stand for any number of them: the second meets the gradients of the first.

    Args:
        args: options of a training script.
        configs: of the models.
        bucket: size of the clips.
        device_type: see `fake_device`.
    """
    models = build_models(args, configs)
    with fake_device(device_type) as tracker:
        state = put_state_on_device(args, models, tracker, device_type)
        tracker.start_measuring()
        micro_steps = min(2, args.gradient_accumulation_steps)
        for number in range(micro_steps):
            if number == micro_steps - 1:
                tracker.recording.flops.clear()
            _micro_step(args, configs, state, bucket, tracker)
        with tracker.making(TEMPORARY):
            torch.nn.utils.clip_grad_norm_(state.trainable, args.max_grad_norm)
            state.optimizer.step()
        state.optimizer.zero_grad()
        return tracker.recording


def _micro_step(args, configs, state, bucket, tracker):
    noisy = fake_batch(args.train_batch_size, configs, bucket, tracker)
    inputs: tuple = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds)
    domains = torch.zeros(args.train_batch_size, dtype=torch.int64, device=DEVICE)
    if not state.models.has_control:
        prediction = state.models.model(*inputs)
    else:
        features = fake_features(args.train_batch_size, configs, bucket, frozen_dtype(args.mixed_precision))
        inputs = (*inputs, features, args.conditioning_scale)
        if state.models.classifier is not None:
            inputs = (*inputs, args.adversarial_weight * domains)
        prediction = state.models.model(*inputs)
    losses = noisy.weights * flow_matching.velocity_loss(prediction.sample, noisy.velocity_target)
    if not state.models.has_control:
        loss = losses.mean()
    else:
        loss = (domain_weights(domains, args.real_weight, args.cg_ratio) * losses).mean()
        if state.models.classifier is not None:
            counted = ~noisy.dropped_control
            loss = loss + domain_loss(prediction.domain_logits, domains, counted, args.cg_ratio).mean()
    torch.autograd.backward(loss / args.gradient_accumulation_steps)


def fake_batch(batch_size: int, configs: ModelConfigs, bucket: Bucket, tracker: Tracker) -> NoisyBatch:
    """Return a noisy batch as of the training loop: it is drawn on the host, and its result is on the device."""
    latents = (batch_size, configs.transformer["in_channels"], *bucket.latent_grid)
    text = (PROMPT_TOKENS, configs.transformer["text_dim"])
    with tracker.making(HOST):
        batch = {
            "latents_mean": torch.zeros(latents),
            "latents_logvar": torch.zeros(latents),
            "prompt_embeds": torch.zeros(batch_size, *text),
        }
        settings = NoiseSettings(seed=0, density=SigmaDensity())
        draw = Draw(list(range(batch_size)), 0, batch_size)
        noisy = make_noisy_batch(batch, settings, draw, torch.zeros(text), DEVICE)
    for tensor in vars(noisy).values():
        tracker.mark(tensor, SAVED)
    return noisy


def fake_features(batch_size: int, configs: ModelConfigs, bucket: Bucket, dtype: torch.dtype) -> torch.Tensor:
    """Return control features as DINOv3 makes them from a bucket's frames, (B, F, h, w, Dd)."""
    patch = configs.dinov3["patch_size"]
    grid = (bucket.num_frames, bucket.height // patch, bucket.width // patch)
    return torch.empty(batch_size, *grid, configs.dinov3["hidden_size"], dtype=dtype, device=DEVICE)
