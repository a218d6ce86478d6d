"""Validate and sample the model of a run in progress."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from c2r.evaluation.conditions import ControlConditions, PromptConditions
from c2r.evaluation.monitor import CGLook, CGMonitor
from c2r.evaluation.monitor_reference import judge_samples, reference_of
from c2r.evaluation.ratio_controller import RatioController
from c2r.evaluation.sample_plan import SamplePlan
from c2r.evaluation.samples import SampleRows, make_samples, sampling_pipeline
from c2r.evaluation.validation import loss_as_trained, noise_levels, validation_metrics
from c2r.evaluation.validation_plot import write_history
from c2r.files import digest
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.pipeline import Sampling
from c2r.sampler import MixedCGRealSampler
from c2r.training.ema import averaged_weights
from c2r.training.failing_together import failing_together
from c2r.training.plan import Plan
from c2r.training.run import Run, TrainState
from c2r.training.step import NoiseSettings
from c2r.training.trackers import record_of


@contextmanager
def evaluating(run: Run, state: TrainState, what: str) -> Iterator[None]:
    """Run the body with the model in eval mode and with averaged weights, if the run keeps an average.

    Each process runs whole clips: without a backward pass they fit where training needs context parallelism. The time
    is recorded under the name `what`.
    """
    whole_clips = nullcontext() if state.context_parallel is None else state.context_parallel.whole_clips()
    with run.timings.measure(what):
        state.model.eval()
        with averaged_weights(state.ema, state.trainable, state.model), whole_clips:
            yield
        state.model.train()


def record_validation(
    run: Run,
    losses: dict[str, torch.Tensor] | None,
    conditions: PromptConditions | ControlConditions,
    **numbers: float,
) -> dict[str, float] | None:
    """Log, plot and print the validation of this step. Call it on every process.

    Args:
        run: the script's run.
        losses: see `validation_metrics`; None if the validation was ended early, which the resumed run repeats.
        conditions: those that the losses were computed under.
        numbers: further numbers to record.

    Returns:
        all numbers; None if there are no losses.
    """
    if losses is None:
        return None
    metrics = validation_metrics(losses, conditions.domains, run.args.flow_shift) | numbers
    noise = NoiseSettings.of(run)
    metrics["loss_as_trained"] = loss_as_trained(
        losses, conditions.domains, noise.density, noise.control_dropout, run.progress.cg_ratio or 0.0
    )
    if run.progress.start_baseline(conditions.setting):
        run.info("other validation clips or noise levels than before, so a new baseline of validation starts")
    metrics["loss_at_start"] = run.progress.metrics.get("loss_at_start", metrics["loss"])
    run.progress.add_validation(metrics)
    run.log("validation", metrics)
    with failing_together(run.accelerator, run.args.output_dir):
        if run.accelerator.is_main_process:
            if (record := record_of(run.accelerator)) is not None:
                record.log_validation(validation_entry(run.progress.global_step, losses, conditions))
            write_history(run.progress.history, run.accelerator, run.args.output_dir)
    gain = f", control gain {metrics['control_gain']:.4f}" if "control_gain" in metrics else ""
    leak = f", leak {metrics['leak_share_coarse']:.2f}" if "leak_share_coarse" in metrics else ""
    run.info(f"validation loss {metrics['loss']:.4f}{gain}{leak}")
    return metrics


def validation_entry(
    step: int, losses: dict[str, torch.Tensor], conditions: PromptConditions | ControlConditions
) -> dict[str, Any]:
    """Return the losses of every clip as `c2r.report` reads them, to compare two runs clip by clip.

    Args:
        step: the optimizer step.
        losses: {condition: (n, S)}, NaN where a clip does not have the condition.
        conditions: those that the losses were computed under.
    """
    fps = conditions.settings.fps
    clips = [
        {"name": f"{clip.name}#{clip.window}", "domain": clip.domain, "key": _clip_key(clip, fps)}
        for clip in conditions.clips
    ]
    # Wrong conditions depend on the whole set of clips: two runs may have another one for the same clip.
    for entry, other in zip(clips, conditions.other_prompt_clips):
        entry["other_prompt"] = digest([other.text])[:16]
    if isinstance(conditions, ControlConditions):
        for entry, other in zip(clips, conditions.other_control.clips):
            entry["other_control"] = _clip_key(other, fps)
    return {
        "step": step,
        "sigmas": [round(sigma, 6) for sigma in noise_levels(conditions.flow_shift).tolist()],
        "clips": clips,
        "losses": {name: _as_lists(table) for name, table in losses.items()},
    }


def _clip_key(clip, fps):
    """Return a digest that is equal for a clip and its copy in another folder: same pixels, noise, prompt, control."""
    target = [clip.name, clip.window, clip.start, *clip.bucket, clip.size, float(fps)]
    return digest([*target, clip.text, clip.control_name, clip.control_size])[:16]


def _as_lists(table):
    """(n, S) -> lists of numbers, None for NaN."""
    return [[None if loss != loss else loss for loss in row] for row in table.double().tolist()]


def sample_and_judge(
    run: Run,
    state: TrainState,
    sample_plan: SamplePlan,
    sampling: Sampling,
    dinov3: DINOv3FeatureExtractor,
    plan: Plan,
) -> tuple[SampleRows | None, CGLook | None]:
    """Make the sample videos of this step and judge them by the CG monitor. Call it on every process.

    Args:
        run, state, plan: the script's. The model must be in eval mode.
        sample_plan: the samples, whose clips must be in the cache.
        sampling: how videos are sampled.
        dinov3: encodes the control.

    Returns:
        the rows of `make_samples`, None if sampling was ended early; and the judgement, None if there are no rows or
        the run is not monitored.
    """
    args, accelerator, samples = run.args, run.accelerator, sample_plan.samples
    transformer = accelerator.unwrap_model(state.model)
    with sampling_pipeline(
        args.pretrained_model_name_or_path, args.flow_shift, transformer, dinov3, run.device
    ) as pipeline:
        rows = make_samples(
            samples,
            pipeline,
            sampling,
            args.flow_shift,
            run.settings,
            args.output_dir,
            accelerator,
            plan.inputs["backbone"],
            lambda: run.go_on("samples"),
        )
        if rows is None or not sample_plan.monitored:
            return rows, None
        if sample_plan.monitor is None:
            reference = reference_of(
                sample_plan.reference_clips,
                pipeline,
                plan.inputs["DINOv3"],
                run.settings,
                accelerator,
                plan.cg.cache_dir,
                run.watchdog.beat,
            )
            sample_plan.monitor = CGMonitor(reference)
        return rows, judge_samples(rows, samples, sample_plan.monitor, dinov3, accelerator)


def record_cg_look(run: Run, cg_look: CGLook, controller: RatioController, sampler: MixedCGRealSampler) -> None:
    """Log and print the CG monitor's judgement, and let the controller lower the CG share."""
    progress = run.progress
    run.info(str(cg_look))
    cg_ratio = controller.step(cg_look.look, progress.cg_ratio)
    if cg_ratio < progress.cg_ratio:
        # The data loader may have drawn up to this number of batches already. The change takes effect after them, so
        # the order of samples does not depend on how many it has drawn.
        sampler.set_cg_ratio(cg_ratio, ahead=2 * run.settings.num_workers)
        run.info(f"cg_ratio lowered from {progress.cg_ratio:g} to {cg_ratio:g}")
        progress.cg_ratio = cg_ratio
    elif advice := controller.advice(cg_look.look, progress.cg_ratio):
        run.info(advice)
    progress.controller = controller.state_dict()
    progress.cg_look = cg_look.scalars() | {"cg_ratio": progress.cg_ratio}
    run.log("monitor", progress.cg_look)
