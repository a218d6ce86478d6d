"""What both training loops need: accelerator, optimizer, the randomness and the noisy batch of a step, logs."""

import hashlib
import os
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from c2r import InputError, flow_matching
from c2r.models.assembly import PhaseContract

# ----------------------------------------------------------------------------------------------------- accelerator


# A process that has encoded its share waits for the others, longer than the ten minutes it would by default.
ENCODING_TIMEOUT = timedelta(days=1)


def build_accelerator(args):
    """The Accelerator of a run, its logs in `output_dir`/logs."""
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--output_dir {output_dir}: cannot be created ({error.strerror})") from error
    accelerator = Accelerator(
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to,
        project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=ENCODING_TIMEOUT)],
        # The schedulers here count optimizer steps; Accelerate would advance a prepared one once per process.
        step_scheduler_with_optimizer=False,
    )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        # Each would train by itself, and all would write into the same folder.
        raise InputError(
            f"{launched} processes were launched, but Accelerate joins {accelerator.num_processes}; "
            "on a machine without a GPU set ACCELERATE_USE_CPU=true"
        )
    return accelerator


def start_logs(accelerator, args):
    """Open the logs, once everything that can be refused has been checked."""
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    accelerator.init_trackers("", config=config)


def in_full_precision(module, device):
    """Exempt a module from autocast. In bf16 the time embedding would round the noise level that it is given."""
    module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def frozen_dtype(accelerator):
    """`weight_dtype`: what frozen weights are kept in. Trainable ones are fp32 under autocast."""
    return torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32


def build_optimizer(parameters, args, device):
    """AdamW over the trainable parameters and the learning-rate schedule, which counts optimizer steps."""
    optimizer = torch.optim.AdamW(
        parameters,
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=device.type == "cuda",
    )
    lr_scheduler = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )
    return optimizer, lr_scheduler


# ------------------------------------------------------------------------------------------------------------ a step


@dataclass
class LoopState:
    """The loop's own state; saved with every checkpoint."""

    global_step: int = 0
    best_validation_loss: float = float("inf")
    # The last validation; phase 2 also keeps what the silent ControlNet scored before the first step.
    metrics: dict = field(default_factory=dict)
    # Fingerprints of what the run is trained on: datasets and backbone.
    inputs: dict = field(default_factory=dict)

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        self.global_step = state["global_step"]
        self.best_validation_loss = state["best_validation_loss"]
        self.metrics = state["metrics"]
        self.inputs = state["inputs"]

    def require_inputs(self, inputs):
        """Raise InputError if a resumed run is given another dataset or backbone than the checkpoint's."""
        for name, fingerprint in inputs.items():
            if self.inputs.get(name) != fingerprint:
                raise InputError(
                    f"--resume_from_checkpoint: the {name} has changed since the checkpoint was written; "
                    "bring it back, or start anew with another --output_dir"
                )


def seeded_generator(*parts):
    """A CPU generator seeded by what is named alone, such as (seed, "noise", rank, micro_step).

    Whatever else the process has drawn, and on whichever machine, the numbers are the same: a resumed run draws what
    the uninterrupted one would have drawn. Ranks differ because they name their rank.
    """
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


@dataclass
class NoisyBatch:
    """What the model is given in one micro-step, and what it should answer."""

    noisy_latents: torch.Tensor  # (B, C, T, h, w) fp32
    timesteps: torch.Tensor  # (B,) fp32 in [0, 1000]
    prompt_embeds: torch.Tensor  # (B, L, D_text)
    velocity_target: torch.Tensor  # (B, C, T, h, w) fp32
    weights: torch.Tensor  # (B,) fp32, of the samples' losses
    sigmas: torch.Tensor  # (B,) fp32
    dropped_control: torch.Tensor  # (B,) bool: train these without control


def make_noisy_batch(batch, args, *, empty_prompt_embeds, micro_step, process_index, num_processes, device):
    """Draw latents, noise levels, noise and dropped conditions for one micro-batch.

    All randomness comes from (seed, rank, micro-step); see `seeded_generator`.

    Args:
        batch: what the data loader gives: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D).
        args: the run's options.
        empty_prompt_embeds: (L, D), what a dropped prompt is replaced by.
        micro_step: the run's micro-steps done, over all optimizer steps. The noise levels of one optimizer step, which
            is `gradient_accumulation_steps` of them on all processes, are stratified together.
        process_index, num_processes: this process among all.
        device: where the result goes.
    """
    own = seeded_generator(args.seed, "step", process_index, micro_step)
    mean, logvar = batch["latents_mean"], batch["latents_logvar"]
    batch_size = len(mean)
    latents = mean + torch.exp(0.5 * logvar) * torch.randn(mean.shape, generator=own)
    noise = torch.randn(latents.shape, generator=own)
    dropped_prompt, dropped_control = (torch.rand(batch_size, generator=own) for _ in range(2))
    sigmas = flow_matching.sample_sigmas(
        batch_size,
        seeded_generator(args.seed, "sigmas", micro_step // args.gradient_accumulation_steps),
        args.flow_shift,
        args.weighting_scheme,
        args.logit_mean,
        args.logit_std,
        args.mode_scale,
        num_processes=num_processes,
        process_index=process_index,
        num_micro_batches=args.gradient_accumulation_steps,
        micro_batch_index=micro_step % args.gradient_accumulation_steps,
    )
    prompt_embeds = torch.where(
        (dropped_prompt < args.prompt_dropout)[:, None, None], empty_prompt_embeds, batch["prompt_embeds"]
    )
    latents, noise, sigmas = latents.to(device), noise.to(device), sigmas.to(device)
    return NoisyBatch(
        noisy_latents=flow_matching.add_noise(latents, noise, sigmas),
        timesteps=flow_matching.timesteps_from_sigmas(sigmas),
        prompt_embeds=prompt_embeds.to(device),
        velocity_target=flow_matching.velocity_target(latents, noise),
        weights=compute_loss_weighting_for_sd3(args.weighting_scheme, sigmas),
        sigmas=sigmas,
        dropped_control=(dropped_control < getattr(args, "control_dropout", 0)).to(device),
    )


# Edges of the noise levels that TensorBoard shows apart: low noise is detail, high noise is layout.
SIGMA_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)


class StepLog:
    """The numbers of one optimizer step over all micro-batches and processes; losses by domain and noise level."""

    def __init__(self, accelerator):
        self.accelerator = accelerator
        self._names = ["loss", "loss_real", "loss_cg"]
        self._names += [f"loss_sigma_{low}-{high}" for low, high in pairwise(SIGMA_BINS)]
        self._reset()

    def _reset(self):
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)  # losses, samples
        self._started = None

    def start(self):
        """Start the step's clock, unless it runs already: validation and saving between two steps do not count."""
        self._started = self._started or time.perf_counter()

    def add(self, losses, sigmas, domains):
        """Add one micro-batch: (B,) weighted losses, (B,) noise levels, (B,) domains, 0 real and 1 CG."""
        losses, sigmas = losses.detach().double().cpu(), sigmas.cpu()
        # The last bin includes 1.
        bins = torch.bucketize(sigmas, torch.tensor(SIGMA_BINS[1:-1]), right=True)
        for columns in (torch.zeros_like(bins), 1 + domains, 3 + bins):
            self._sums[0].index_add_(0, columns, losses)
            self._sums[1].index_add_(0, columns, torch.ones_like(losses))

    def finish(self, **numbers):
        """The numbers by their TensorBoard names, with those given; starts the next step. Call on every process."""
        sums, samples = self.accelerator.reduce(self._sums.to(self.accelerator.device).float(), reduction="sum").cpu()
        logs = {f"train/{k}": (sums[i] / samples[i]).item() for i, k in enumerate(self._names) if samples[i]}
        logs["train/samples_per_second"] = samples[0].item() / (time.perf_counter() - self._started)
        if self.accelerator.device.type == "cuda":
            logs["train/gpu_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self._reset()
        return logs | {f"train/{k}": v for k, v in numbers.items()}


# ---------------------------------------------------------------------------------------------------------- results


def build_contract(args, state, phase, base_model, manifests, **phase2):
    """What best/ and final/ say of themselves; see `PhaseContract`."""
    return PhaseContract(
        phase=phase,
        base_model=base_model,
        step=state.global_step,
        validation_loss=state.metrics.get("loss"),
        metrics=state.metrics,
        dataset_fingerprints={manifest.domain: manifest.fingerprint for manifest in manifests},
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        fps=args.fps,
        flow_shift=args.flow_shift,
        **phase2,
    )
