"""A training step: the models, forward and optimizer of a run, and the functions of its loop.

It runs without memory on the fake device, and for `--measure` on a real one.
"""

import math
from argparse import Namespace
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from diffusers import ModelMixin, WanTransformer3DModel

from c2r import flow_matching
from c2r.data.buckets import Bucket
from c2r.estimation.configs import ModelConfigs, build_backbone, build_dinov3, build_joined
from c2r.estimation.fake_device import DEVICE, put_on_device
from c2r.estimation.tracker import AVERAGE, FROZEN, GRADIENTS, OPTIMIZER, TEMPORARY, TRAINABLE, Recording, Tracker
from c2r.flow_matching import SigmaDensity
from c2r.models.adversary import DomainClassifier, WithAdversary, domain_loss
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.lora import LoraWeights
from c2r.models.offloading import StoredBlock, store_blocks
from c2r.training.backward_step import StepInBackward
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
                    self.state[parameter].update(self._states(parameter))

    def _states(self, parameter):
        count = parameter.numel()
        dtype = torch.float32 if count < 4096 else torch.uint8
        for moment in ("1", "2"):
            yield f"state{moment}", torch.zeros_like(parameter, dtype=dtype)
            if dtype == torch.uint8:
                yield f"absmax{moment}", torch.zeros(-(-count // 256), dtype=torch.float32, device=parameter.device)


@dataclass(frozen=True)
class Inputs:
    """Sizes of a micro-batch, and tensors of these sizes."""

    configs: ModelConfigs
    bucket: Bucket
    batch_size: int
    dtype: torch.dtype  #: of the control features
    device: torch.device = DEVICE

    def noisy_batch(self) -> NoisyBatch:
        """Return a noisy batch as of the training loop: it is drawn on the CPU, and its tensors are on the device."""
        latents = torch.zeros(self.batch_size, self.configs.transformer["in_channels"], *self.bucket.latent_grid)
        text = torch.zeros(self.batch_size, PROMPT_TOKENS, self.configs.transformer["text_dim"])
        batch = {"latents_mean": latents, "latents_logvar": latents, "prompt_embeds": text}
        settings = NoiseSettings(seed=0, density=SigmaDensity())
        draw = Draw(list(range(self.batch_size)), 0, self.batch_size)
        return make_noisy_batch(batch, settings, draw, text[0], self.device)

    def control_features(self) -> torch.Tensor:
        """Return control features (B, F, h, w, Dd) as DINOv3 makes them."""
        patch, width = self.configs.dinov3["patch_size"], self.configs.dinov3["hidden_size"]
        frames, height, pixels = self.bucket
        return torch.zeros(
            self.batch_size, frames, height // patch, pixels // patch, width, dtype=self.dtype, device=self.device
        )

    def control_frames(self) -> torch.Tensor:
        """Return the frames that DINOv3 reads, (B, F, 3, H, W) uint8."""
        frames, height, width = self.bucket
        return torch.empty(self.batch_size, frames, 3, height, width, dtype=torch.uint8, device=DEVICE)


@dataclass
class TrainingModels:
    """A run's models."""

    model: torch.nn.Module  #: the one that is called
    backbone: WanTransformer3DModel
    module: ModelMixin  #: the part that trains, a domain classifier apart
    classifier: DomainClassifier | None = None
    dinov3: DINOv3FeatureExtractor | None = None  #: in phase 2

    @property
    def has_control(self) -> bool:
        """True in phase 2."""
        return self.dinov3 is not None


def build_models(args: Namespace, configs: ModelConfigs, device: torch.device = DEVICE) -> TrainingModels:
    """Build the models that the scripts build; with `control_layers` the options are phase 2's.

    Args:
        args: options of a training script.
        configs: of the models.
        device: DEVICE, or a real one, which the models are moved to, with random weights.

    Raises:
        InputError: the backbone has too few blocks for the control branch.
    """
    fake = device == DEVICE
    made_on = "meta" if fake else "cpu"
    dtype = frozen_dtype(args.mixed_precision)
    if not hasattr(args, "control_layers"):
        if args.lora_rank is not None:
            return _build_lora(args, configs, dtype, device, made_on)
        backbone = build_backbone(configs.transformer, torch.float32, made_on).requires_grad_(True).to(device)
        return TrainingModels(backbone, backbone, backbone)
    joined = build_joined(
        *(configs, dtype),
        control_layers=args.control_layers,
        control_stride=args.control_stride,
        injection=args.injection,
        device=made_on,
    )
    if args.offload_backbone or args.fp8_backbone:
        store_blocks(joined.transformer.blocks, device, args.offload_backbone, args.fp8_backbone)
    if args.offload_backbone and fake:
        move_to_host(joined.transformer.blocks)
    joined.to(device)
    dinov3 = build_dinov3(configs.dinov3, dtype, made_on).to(device)
    models = TrainingModels(joined, joined.transformer, joined.controlnet, dinov3=dinov3)
    if args.adversarial_weight > 0:
        with device:
            models.classifier = DomainClassifier(joined.transformer.config.out_channels)
        models.model = WithAdversary(joined, models.classifier)
    return models


def _build_lora(args, configs, dtype, device, made_on):
    """Return a frozen backbone with a LoRA, as phase 1 builds them."""
    backbone = build_backbone(configs.transformer, dtype, made_on)
    with torch.device(made_on):
        lora = LoraWeights.from_config(LoraWeights.config_of(configs.transformer, args.lora_rank))
    lora.attach(backbone)
    if args.offload_backbone:
        store_blocks(backbone.blocks, device, offload=True)
        if device == DEVICE:
            move_to_host(backbone.blocks)
    return TrainingModels(backbone.to(device), backbone, lora)


def move_to_host(blocks: Iterable[StoredBlock]) -> None:
    """Replace the tensors that `StoredBlock`s store by memory of the host that is never touched."""
    for block in blocks:
        for name, parameter in block.stored_parameters():
            path, _, own = name.rpartition(".")
            empty = torch.nn.Parameter(torch.empty_like(parameter, device="cpu"), requires_grad=False)
            block.block.get_submodule(path).register_parameter(own, empty)
        for name, buffer in block.named_buffers(recurse=False):
            block._buffers[name] = torch.empty_like(buffer, device="cpu")


def fetch_ahead(block: StoredBlock, tracker: Tracker) -> list[torch.Tensor]:
    """Return memory like that of the block which is copied to the device while another one runs."""
    with tracker.making(FROZEN):
        return [torch.empty_like(tensor, device=DEVICE) for _, tensor in block.stored_parameters()]


class Untracked:
    """In place of a tracker, on a real device."""

    def making(self, kind: str) -> AbstractContextManager[None]:
        """See `Tracker.making`."""
        return nullcontext()


@dataclass
class TrainingState:
    """A run's models and optimizer on the device."""

    models: TrainingModels
    trainable: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    average: list[torch.Tensor] = field(default_factory=list)  #: of --ema_decay
    fetched_ahead: list[torch.Tensor] = field(default_factory=list)  #: the backbone block that is copied next
    in_backward: StepInBackward | None = None

    def make_gradients(self, tracker: Tracker | Untracked) -> None:
        """Give every trainable parameter a gradient."""
        with tracker.making(GRADIENTS):
            for parameter in self.trainable:
                parameter.grad = torch.zeros_like(parameter)


def put_state_on_device(args: Namespace, models: TrainingModels, tracker: Tracker, device_type: str) -> TrainingState:
    """Put the models on the fake device and build the optimizer, with the states that its first step makes.

    Args:
        args: options of a training script.
        models: from `build_models`.
        tracker: of the fake device that is entered.
        device_type: see `fake_device`.
    """
    put_on_device(models.model, tracker, device_type)
    if models.dinov3 is not None:
        put_on_device(models.dinov3, tracker, device_type)
    state = build_state(args, models, DEVICE, tracker, lambda: EightBitStates)
    if getattr(args, "offload_backbone", False):
        state.fetched_ahead = fetch_ahead(models.backbone.blocks[0], tracker)
    for parameter in state.trainable:
        tracker.mark(parameter, TRAINABLE)  # --weight_storage bf16 has replaced it
        parameter.register_post_accumulate_grad_hook(lambda p: tracker.mark(p.grad, GRADIENTS))
    if args.step_in_backward:  # after the hooks above: it frees each gradient
        state.in_backward = StepInBackward(state.optimizer)
    return state


def build_state(
    args: Namespace,
    models: TrainingModels,
    device: torch.device,
    tracker: Tracker | Untracked,
    adamw_8bit_class: Callable[[], type[torch.optim.Optimizer]] | None = None,
) -> TrainingState:
    """Build the optimizer, its states and the moving average; `args.step_in_backward` is left to the caller.

    Args:
        args: options of a training script.
        models: on the device.
        device: DEVICE, or a real one.
        tracker: of the fake device.
        adamw_8bit_class: see `build_optimizer`.
    """
    set_forward(args, models.model, models.backbone, device)
    with tracker.making(OPTIMIZER):
        optimizer = build_optimizer(
            models.module, OptimizerSettings.of(args), device, models.classifier, adamw_8bit_class
        )
    trainable = [parameter for parameter in models.model.parameters() if parameter.requires_grad]
    state = TrainingState(models, trainable, optimizer)
    state.make_gradients(tracker)
    with tracker.making(OPTIMIZER):
        optimizer.step()
    if args.ema_decay is not None:
        with tracker.making(AVERAGE):
            state.average = [parameter.detach().clone() for parameter in models.module.parameters()]
    optimizer.zero_grad()
    return state


def record_step(args: Namespace, state: TrainingState, inputs: Inputs, tracker: Tracker) -> Recording:
    """Record `take_step` on the fake device."""
    with tracker.measuring() as recording:
        take_step(args, state, inputs, tracker)
    return recording


def take_step(args: Namespace, state: TrainingState, inputs: Inputs, tracker: Tracker | Untracked) -> None:
    """Take an optimizer step of one micro-step, or the last of several micro-steps, which meets earlier gradients.

    Args:
        args: options of a training script.
        state: of the run.
        inputs: sizes of a micro-batch.
        tracker: of the fake device that is entered.
    """
    if args.gradient_accumulation_steps > 1:
        state.make_gradients(tracker)
    _micro_step(args, state, inputs)
    if state.in_backward is None:
        with tracker.making(TEMPORARY):
            torch.nn.utils.clip_grad_norm_(state.trainable, args.max_grad_norm or math.inf)
            state.optimizer.step()
        state.optimizer.zero_grad()


def _micro_step(args, state, sizes):
    models = state.models
    noisy = sizes.noisy_batch()
    inputs: tuple = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds)
    domains = torch.zeros(sizes.batch_size, dtype=torch.int64, device=sizes.device)
    if models.has_control:
        inputs = (*inputs, sizes.control_features(), args.conditioning_scale)
    if models.classifier is not None:
        inputs = (*inputs, args.adversarial_weight * domains)
    prediction = models.model(*inputs)
    losses = noisy.weights * flow_matching.velocity_loss(prediction.sample, noisy.velocity_target)
    loss = losses.mean()
    if models.has_control:
        loss = (domain_weights(domains, args.real_weight, args.cg_ratio) * losses).mean()
    if models.classifier is not None:
        loss = loss + domain_loss(prediction.domain_logits, domains, ~noisy.dropped_control, args.cg_ratio).mean()
    torch.autograd.backward(loss / args.gradient_accumulation_steps)
