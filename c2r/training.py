"""What both training loops need: options, accelerator, optimizer, the randomness and the noisy batch of a step."""

import argparse
import hashlib
import sys
import time
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, ProjectConfiguration
from diffusers.optimization import SchedulerType, get_scheduler
from diffusers.training_utils import compute_loss_weighting_for_sd3

from c2r import InputError, flow_matching
from c2r.models.assembly import PhaseContract

# ---------------------------------------------------------------------------------------------------------- options


def add_common_options(parser, **defaults):
    """Add the options of both phases.

    Args:
        parser: an `argparse.ArgumentParser`.
        defaults: values that differ between the phases, by option name.
    """
    group = parser.add_argument_group("run")
    group.add_argument(
        "--config", metavar="FILE.yaml", help="sets any option below by its name; the command line wins"
    )
    group.add_argument("--output_dir", required=True, help="checkpoints, best/, final/ and logs/ go here")
    group.add_argument("--seed", type=int, default=0, help="of everything random in the run")
    group.add_argument(
        "--mixed_precision", choices=("no", "bf16"), help="autocast; default: what accelerate's configuration says"
    )
    group.add_argument("--report_to", default="tensorboard", choices=("tensorboard", "none"), help="where logs go")

    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        default="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        help="Wan 2.1 in Diffusers' layout, a folder or a hub id: VAE, UMT5, tokenizer and the DiT's configuration",
    )
    group.add_argument("--gradient_checkpointing", action=argparse.BooleanOptionalAction, default=True)

    group = parser.add_argument_group("data")
    group.add_argument("--real_dataset", required=True, help="folder with real videos and metadata.csv")
    group.add_argument(
        "--cache_dir", help="for latents and prompt embeddings; default: .c2r_cache in each dataset's folder"
    )
    group.add_argument("--height", type=int, default=480, help="pixels, divisible by 16")
    group.add_argument("--width", type=int, default=832, help="pixels, divisible by 16")
    group.add_argument("--num_frames", type=int, default=81, help="frames of a clip, 4k + 1")
    group.add_argument("--fps", type=float, default=16.0, help="frame rate that the clips are resampled to")
    group.add_argument("--dataloader_num_workers", type=int, default=4, help="per process; 0 loads in the loop itself")
    group.add_argument(
        "--num_validation_clips", type=int, default=8, help="held-out clips of each domain to validate on"
    )

    group = parser.add_argument_group("optimisation")
    group.add_argument("--train_batch_size", type=int, help="clips per device and micro-step")
    group.add_argument("--gradient_accumulation_steps", type=int, help="micro-steps per optimizer step")
    group.add_argument("--max_train_steps", type=int, help="optimizer steps")
    group.add_argument("--learning_rate", type=float)
    group.add_argument("--lr_scheduler", default="constant_with_warmup", choices=[s.value for s in SchedulerType][:6])
    group.add_argument("--lr_warmup_steps", type=int, default=100, help="optimizer steps")
    group.add_argument("--adam_beta1", type=float, default=0.9)
    group.add_argument("--adam_beta2", type=float, default=0.999)
    group.add_argument("--adam_weight_decay", type=float, default=0.01)
    group.add_argument("--adam_epsilon", type=float, default=1e-8)
    group.add_argument("--max_grad_norm", type=float, default=1.0, help="gradients are clipped to this norm")

    group = parser.add_argument_group("flow matching")
    group.add_argument(
        "--flow_shift", type=float, default=3.0, help="shift of the noise levels: 3 for 480p, 5 for 720p"
    )
    group.add_argument(
        "--weighting_scheme",
        default="none",
        choices=flow_matching.WEIGHTING_SCHEMES,
        help="density of the noise levels and weight of the loss, as in diffusers.training_utils",
    )
    group.add_argument("--logit_mean", type=float, default=0.0, help="of logit_normal; above 0: more noise")
    group.add_argument("--logit_std", type=float, default=1.0, help="of logit_normal")
    group.add_argument("--mode_scale", type=float, default=1.29, help="of mode")
    group.add_argument(
        "--prompt_dropout", type=float, default=0.1, help="share of samples trained with the empty prompt"
    )

    group = parser.add_argument_group("checkpoints and validation")
    group.add_argument("--checkpointing_steps", type=int, default=2000, help="optimizer steps between checkpoints")
    group.add_argument("--checkpoints_total_limit", type=int, help="older ones are deleted; default: keep all")
    group.add_argument(
        "--resume_from_checkpoint",
        metavar="PATH|latest",
        help="a checkpoint-N folder; latest starts anew if there is none",
    )
    group.add_argument("--validation_steps", type=int, default=500, help="optimizer steps between validations")
    parser.set_defaults(**defaults)


def parse_options(parser, argv=None):
    """Parse the command line over `--config FILE.yaml` over the defaults, and check what can be checked at once.

    Raises:
        InputError: for an unknown key or a bad value in the file, or for options that do not fit each other.
    """
    config = parser_for_config().parse_known_args(argv)[0].config
    actions = {action.dest: action for action in parser._actions}
    if config is not None:
        for key, value in _read_config(config, actions).items():
            parser.set_defaults(**{key: value})
            actions[key].required = False
    args = parser.parse_args(argv)
    check_options(args)
    return args


def parser_for_config():
    """A parser that knows --config only: the file must be read before the rest can be parsed."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    return parser


def _read_config(path, actions):
    try:
        values = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: must hold lines of the form 'option: value'")
    checked = {}
    for key, value in values.items():
        if key not in actions or key in ("config", "help"):
            raise InputError(f"--config {path}: unknown option {key!r}; see --help for the names")
        action = actions[key]
        if action.nargs == 0:
            valid = isinstance(value, bool)
        else:
            # YAML reads 1e-5 as a string; the option's own type decides.
            try:
                value = value if value is None or action.type is None else action.type(value)
                valid = action.choices is None or value is None or value in action.choices
            except (TypeError, ValueError):
                valid = False
        if not valid:
            raise InputError(f"--config {path}: {key}: {value!r} is not a valid value; see --help")
        checked[key] = value
    return checked


def check_options(args):
    """Raise InputError for the first value that cannot work."""
    for name in ("height", "width"):
        value = getattr(args, name)
        if value < 16 or value % 16:
            raise InputError(f"--{name} {value}: must be divisible by 16; try {max(16, round(value / 16) * 16)}")
    if args.num_frames < 1 or args.num_frames % 4 != 1:
        raise InputError(f"--num_frames {args.num_frames}: must be 4k + 1; try {max(1, args.num_frames // 4 * 4 + 1)}")
    positive = ("train_batch_size", "gradient_accumulation_steps", "max_train_steps", "checkpointing_steps")
    for name in (*positive, "validation_steps", "num_validation_clips", "fps", "flow_shift", "max_grad_norm"):
        if getattr(args, name) <= 0:
            raise InputError(f"--{name} {getattr(args, name)}: must be above 0")
    if args.checkpoints_total_limit is not None and args.checkpoints_total_limit < 1:
        raise InputError(f"--checkpoints_total_limit {args.checkpoints_total_limit}: must be at least 1")
    for name in ("prompt_dropout", "control_dropout", "cg_ratio"):
        if not 0 <= getattr(args, name, 0) <= 1:
            raise InputError(f"--{name} {getattr(args, name)}: must be from 0 to 1")
    for name in ("learning_rate", "lr_warmup_steps", "dataloader_num_workers"):
        if getattr(args, name) < 0:
            raise InputError(f"--{name} {getattr(args, name)}: must not be negative")


def run(main):
    """Run a script's main; bad input ends it with one line instead of a traceback."""
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")


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
    accelerator.init_trackers(
        "", config={k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    )
    return accelerator


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

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        self.global_step = state["global_step"]
        self.best_validation_loss = state["best_validation_loss"]
        self.metrics = state["metrics"]


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


def make_noisy_batch(
    batch, args, *, empty_prompt_embeds, global_step, micro_step, process_index, num_processes, device
):
    """Draw latents, noise levels, noise and dropped conditions for one micro-batch.

    All randomness comes from (seed, rank, micro-step); see `seeded_generator`.

    Args:
        batch: what the data loader gives: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D).
        args: the run's options.
        empty_prompt_embeds: (L, D), what a dropped prompt is replaced by.
        global_step: optimizer steps done; the noise levels of one such step are stratified together.
        micro_step: the run's micro-steps done, over all optimizer steps.
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
        seeded_generator(args.seed, "sigmas", global_step),
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
        self._started = time.perf_counter()

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
        dataset_fingerprints={manifest.folder.name: manifest.fingerprint for manifest in manifests},
        height=args.height,
        width=args.width,
        num_frames=args.num_frames,
        fps=args.fps,
        flow_shift=args.flow_shift,
        **phase2,
    )
