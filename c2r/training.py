"""What both training loops need: precision, the loop's state, the randomness and the noisy batch of a step, logs."""

import hashlib
import math
import time
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise

import torch
from diffusers.training_utils import compute_loss_weighting_for_sd3

from c2r import flow_matching
from c2r.augmentation import augment_control_frames
from c2r.data.buckets import buckets_of
from c2r.models.assembly import PhaseContract

# ----------------------------------------------------------------------------------------------- logs and precision


def start_logs(accelerator, args, loop):
    """Open the logs, once everything that can be refused has been checked.

    What an earlier run that was killed has logged after the step from which this one goes on is taken back. So is that
    step itself if its validation is still to come: one that was killed in between may have logged it already.
    """
    config = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in vars(args).items()}
    again = loop.global_step == 0 or loop.validation_due(args)
    purge_step = loop.global_step if again else loop.global_step + 1
    accelerator.init_trackers("", config=config, init_kwargs={"tensorboard": {"purge_step": purge_step}})
    if again and loop.logs:
        accelerator.log(loop.logs, loop.global_step)


def tensorboard_writer(accelerator):
    """The run's `SummaryWriter`; None on other processes and with `--report_to none`."""
    return next((tracker.tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"), None)


def in_full_precision(module, device):
    """Exempt a module from autocast. In bf16 the time embedding would round the noise level that it is given."""
    module.forward = torch.autocast(device.type, enabled=False)(module.forward)


def frozen_dtype(args):
    """`weight_dtype`: what frozen weights are kept in. Trainable ones are fp32 under autocast."""
    return torch.bfloat16 if args.mixed_precision == "bf16" else torch.float32


def under_autocast(model, device, args):
    """Run the model's forward in `--mixed_precision`. Not Accelerate's: the engines would cast the weights too.

    Autocast's cache would keep a bf16 copy of every trainable weight until the forward ends, whole ones under a
    sharding engine too (28.6 GB at 14B), and each weight is used once.
    """
    enabled = args.mixed_precision == "bf16"
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)
    model.forward = autocast(model.forward)


# ------------------------------------------------------------------------------------------------------------ a step


@dataclass
class LoopState:
    """The loop's own state; saved with every checkpoint."""

    global_step: int = 0
    # What best/ holds: {the number that it is chosen by: its value}.
    best: dict = field(default_factory=dict)
    # The last validation: its step and its numbers.
    validated_step: int | None = None
    metrics: dict = field(default_factory=dict)
    # Up to which step sample videos have been made.
    sampled_step: int | None = None
    # All validations, each its `step` and its numbers: what the plot shows.
    history: list = field(default_factory=list)
    # The last step's numbers, as they were logged.
    logs: dict = field(default_factory=dict)
    # Fingerprints of what the run is trained on: datasets and backbone.
    inputs: dict = field(default_factory=dict)
    # What the guards know: skipped steps up to here without a break, and the last steps' log losses.
    skipped_in_a_row: int = 0
    log_losses: list = field(default_factory=list)
    # The CG share from here on, and --cg_ratio of the run that saved: another one on the command line takes effect.
    cg_ratio: float | None = None
    asked_cg_ratio: float | None = None
    # The ratio controller's memory, and what the CG monitor has said last.
    controller: dict = field(default_factory=dict)
    look: dict = field(default_factory=dict)

    def state_dict(self):
        return asdict(self)

    def load_state_dict(self, state):
        for entry in fields(self):
            setattr(self, entry.name, state[entry.name])

    def add_validation(self, metrics):
        """Take in the numbers of this step's validation."""
        self.validated_step, self.metrics = self.global_step, metrics
        self.history = [*self.history, {"step": self.global_step} | metrics]

    def is_best(self, by="loss"):
        """Whether the last validation is the best so far by one of its numbers, if that is finite; remembers it.

        Args:
            by: "loss", the lower the better, or "control_gain", the higher the better. Where it is another one than
                before, the best is looked for anew.
        """
        value, best = self.metrics[by], self.best.get(by)
        sign = -1 if by == "loss" else 1
        if not math.isfinite(value) or (best is not None and sign * value <= sign * best):
            return False
        self.best = {by: value}
        return True

    @property
    def best_text(self):
        """Such as "validation loss 0.4321"."""
        return ", ".join(f"validation {by.replace('_', ' ')} {value:.4f}" for by, value in self.best.items())

    def validation_due(self, args):
        """Whether this step is to be validated: a resumed run makes up for what the stopped one did not reach."""
        return self._at_interval(args.validation_steps, args) and self.validated_step != self.global_step

    def sampling_due(self, args):
        """Whether videos are to be made at this step; before the first one they would all be the backbone's own."""
        wanted = args.num_samples > 0 and self.global_step > 0 and self.sampled_step != self.global_step
        return wanted and self._at_interval(args.sample_steps, args)

    def _at_interval(self, steps, args):
        return self.global_step % steps == 0 or self.global_step == args.max_train_steps


def tell_small_buckets(accelerator, sampler, buckets):
    """Say which buckets have so few clips that a batch over all processes holds some of them twice."""
    for number, count in sampler.small_buckets().items():
        accelerator.print(
            f"bucket {buckets[number]}: its {count} clips are fewer than a batch over all processes, "
            f"{sampler.batch_size * sampler.num_processes}: batches repeat them; add clips, or leave the bucket out"
        )


def seeded_generator(*parts):
    """A CPU generator seeded by what is named alone, such as (seed, "sample", micro_step, place).

    Whatever else the process has drawn, and on whichever machine, the numbers are the same: a resumed run draws what
    the uninterrupted one would have drawn. Samples differ because each names its place.
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

    All randomness comes from the seed, the micro-step and the sample's place in the micro-batch of all processes; see
    `seeded_generator`. So two processes with a batch of 2 draw what one with a batch of 4 draws.

    Args:
        batch: what the data loader gives: `latents_mean`, `latents_logvar` (B, C, T, h, w), `prompt_embeds` (B, L, D).
        args: the run's options.
        empty_prompt_embeds: (L, D), what a dropped prompt is replaced by.
        micro_step: the run's micro-steps done, over all optimizer steps. The noise levels of one optimizer step, which
            is `gradient_accumulation_steps` of them on all processes, are stratified together.
        process_index, num_processes: this process among all.
        device: where the result goes.
    """
    mean, logvar = batch["latents_mean"], batch["latents_logvar"]
    batch_size = len(mean)
    first = process_index * batch_size
    own = [seeded_generator(args.seed, "sample", micro_step, first + i) for i in range(batch_size)]
    spread, noise = (torch.stack([torch.randn(mean.shape[1:], generator=g) for g in own]) for _ in range(2))
    dropped_prompt, dropped_control = (torch.stack([torch.rand((), generator=g) for g in own]) for _ in range(2))
    latents = mean + torch.exp(0.5 * logvar) * spread
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


def domain_weights(domains, real_weight, cg_ratio):
    """`--real_weight`: weights of the samples' losses, those of real ones `real_weight` times those of CG ones.

    Args:
        domains: (B,) 0 real, 1 CG.
        real_weight: above 0; 1 gives all the weight 1.
        cg_ratio: share of CG samples among those that are drawn, in [0, 1].

    Returns:
        (B,) fp32, 1 on average over the run: the gradient does not grow with `real_weight`.
    """
    mean = cg_ratio + real_weight * (1 - cg_ratio)
    return torch.tensor([real_weight / mean, 1 / mean], device=domains.device)[domains]


def augment_real_control(control_frames, domains, args, *, micro_step, process_index):
    """Alter the look of the control of `--control_augmentation` of the real clips; see `augment_control_frames`.

    As in `make_noisy_batch` the randomness comes from the seed, the micro-step and the sample's place.

    Args:
        control_frames: (B, F, 3, H, W) floats in [0, 1].
        domains: (B,), 0 real and 1 CG. CG pairs are left as they are.

    Returns:
        (B, F, 3, H, W): the tensor itself where nothing is to be altered.
    """
    if args.control_augmentation == 0:
        return control_frames
    clips, first = [], process_index * len(domains)
    for i, (frames, domain) in enumerate(zip(control_frames, domains.tolist())):
        own = seeded_generator(args.seed, "augmentation", micro_step, first + i)
        chosen = torch.rand((), generator=own) < args.control_augmentation
        clips.append(augment_control_frames(frames, own) if chosen and domain == 0 else frames)
    return torch.stack(clips)


# Edges of the noise levels that TensorBoard shows apart: low noise is detail, high noise is layout.
SIGMA_BINS = (0.0, 0.25, 0.5, 0.75, 1.0)

# Of the domain classifier.
ACCURACIES = ("domain_accuracy_real", "domain_accuracy_cg")


class StepLog:
    """The numbers of one optimizer step over all micro-batches and processes; losses by domain and noise level.

    Args:
        accelerator: the run's.
        before: what the last step before this run's first one has logged; running averages go on from it.
    """

    def __init__(self, accelerator, before=None):
        self.accelerator = accelerator
        self._accuracies = {name: (before or {}).get(f"train/{name}") for name in ACCURACIES}
        self._names = ["loss", "loss_real", "loss_cg"]
        self._names += [f"loss_sigma_{low}-{high}" for low, high in pairwise(SIGMA_BINS)]
        self._names += ["real_loss_share", "domain_loss", *ACCURACIES]
        self._reset()

    def _reset(self):
        self._sums = torch.zeros(2, len(self._names), dtype=torch.float64)  # losses (or hits), samples
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

    def add_weighted(self, losses, domains):
        """Add what one micro-batch is trained on, (B,) losses with the weights of their domains: real ones' share."""
        losses = losses.detach().double().cpu()
        column = self._names.index("real_loss_share")
        self._sums[:, column] += torch.stack([losses[domains == 0].sum(), losses.sum()])

    def add_domain_logits(self, losses, logits, domains, counted):
        """Add what the domain classifier said of one micro-batch: (B,) losses, logits, domains, and which count."""
        losses, hits, counted = losses.detach().double().cpu(), ((logits > 0).cpu() == domains).double(), counted.cpu()
        first = self._names.index("domain_loss")
        for columns, values in ((torch.zeros_like(domains), losses), (1 + domains, hits)):
            self._sums[0].index_add_(0, first + columns[counted], values[counted])
            self._sums[1].index_add_(0, first + columns[counted], torch.ones_like(values[counted]))

    def finish(self, **numbers):
        """The numbers by their TensorBoard names, with those given; starts the next step. Call on every process."""
        sums, samples = self.accelerator.reduce(self._sums.to(self.accelerator.device).float(), reduction="sum").cpu()
        logs = {f"train/{k}": (sums[i] / samples[i]).item() for i, k in enumerate(self._names) if samples[i]}
        # Also in a step without a sample that counts: a run that is resumed at it goes on from what is logged.
        if "train/domain_loss" in logs or None not in self._accuracies.values():
            logs |= self._running_accuracies(logs)
        logs["train/samples_per_second"] = samples[0].item() / (time.perf_counter() - self._started)
        if self.accelerator.device.type == "cuda":
            logs["train/gpu_memory_gib"] = torch.cuda.max_memory_reserved() / 2**30
        self._reset()
        return logs | {f"train/{k}": v for k, v in numbers.items()}

    def _running_accuracies(self, logs):
        """Accuracy over the last twenty or so steps in each domain, and the mean of the two: a step has too few."""
        for name, before in self._accuracies.items():
            before = 0.5 if before is None else before
            self._accuracies[name] = 0.95 * before + 0.05 * logs.get(f"train/{name}", before)
        accuracies = {f"train/{name}": value for name, value in self._accuracies.items()}
        return accuracies | {"train/domain_accuracy": sum(accuracies.values()) / 2}


# ---------------------------------------------------------------------------------------------------------- results


def build_contract(args, state, phase, base_model, manifests, **phase2):
    """What best/ and final/ say of themselves; see `PhaseContract`."""
    return PhaseContract(
        phase=phase,
        base_model=base_model,
        step=state.global_step,
        validation_loss=state.metrics.get("loss"),
        metrics=state.metrics | state.look,
        dataset_fingerprints={manifest.domain: manifest.fingerprint for manifest in manifests},
        **max(buckets_of(args), key=math.prod)._asdict(),
        fps=args.fps,
        flow_shift=args.flow_shift,
        **phase2,
    )
