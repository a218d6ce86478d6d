"""The state of a training run that is saved with every checkpoint."""

import math
from dataclasses import asdict, dataclass, field, fields

from c2r.data.buckets import buckets_of
from c2r.models.contract import PhaseContract


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
