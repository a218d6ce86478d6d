"""Phase 2: ground the control on mixed CG and real video, over the frozen backbone of phase 1.

    accelerate launch train_phase2.py --resume_backbone_from outputs/phase1/best \\
        --real_dataset data/real --cg_dataset data/cg --cg_ratio 0.2 --output_dir outputs/phase2

The control adapter, the ControlNet blocks and their projector MLPs are trained on frozen DINOv3 features. CG samples
are pairs (coarse control, fine target); real clips are their own control. best/ and final/ hold the ControlNet alone
and name the backbone that it belongs to.
"""

from c2r import cli
from c2r.options import PHASE2

if __name__ == "__main__":
    cli.check_command_line(PHASE2)  # before the imports below, which take seconds

from dataclasses import dataclass

import numpy as np
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import ConcatDataset

from c2r import flow_matching
from c2r.data.clips import Clip, Clips
from c2r.encoding.cache import ControlSettings
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.conditions import ControlConditions, choose_validation_clips
from c2r.evaluation.evaluate_run import evaluating, record_cg_look, record_validation, sample_and_judge
from c2r.evaluation.projection_fit import fit_projection, obtain_projection
from c2r.evaluation.ratio_controller import RatioController
from c2r.evaluation.sample_plan import SamplePlan, plan_samples
from c2r.evaluation.samples import write_samples
from c2r.evaluation.validation import leak_warning
from c2r.models.adversary import DomainClassifier, WithAdversary, domain_loss
from c2r.models.backbone import find_lora, load_transformer
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import load_control_start, load_controlnet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.offloading import store_blocks
from c2r.models.transformer import C2RTransformer
from c2r.pipeline import Sampling
from c2r.sampler import MixedCGRealSampler
from c2r.training.batches import TrainBatches
from c2r.training.checkpoint import load_domain_classifier, save_checkpoint
from c2r.training.devices import to_device
from c2r.training.dry_run import launch, limit_to_dry_run
from c2r.training.ema import step_ema
from c2r.training.engine import reads_weights
from c2r.training.guard import StepGuard
from c2r.training.logs import StepLog
from c2r.training.plan import Plan, check_phase2, encode_until_usable
from c2r.training.results import save_model
from c2r.training.run import Run, TrainState
from c2r.training.setup import build_train_state, resume
from c2r.training.split_weights import local_fingerprint
from c2r.training.step import (
    NoiseSettings,
    augment_real_control,
    clip_gradients,
    domain_weights,
    finish_step,
    kept_directions,
    make_noisy_batch,
)


@dataclass
class ChosenClips:
    """The clips that this run uses."""

    real: Clips  #: training clips
    cg: Clips  #: training clips
    conditions: ControlConditions  #: the validation clips with their own conditions and wrong ones
    sample_plan: SamplePlan

    @property
    def train(self) -> list[Clips]:
        """Clips to train on, by domain."""
        return [self.real, self.cg]

    @property
    def held_out(self) -> list[Clip]:
        """Clips that validation and samples need."""
        return [*self.conditions.to_encode, *self.sample_plan.to_encode]


def choose_clips(run: Run, plan: Plan) -> ChosenClips:
    """Choose the clips to train on, to validate on and to sample from."""
    args = run.args
    real = limit_to_dry_run(plan.real.train, run)
    cg = limit_to_dry_run(plan.cg.train, run) if plan.cg else real[:0]
    conditions = ControlConditions(
        [clip for mixture in plan.mixtures for clip in choose_validation_clips(mixture, args.num_validation_clips)],
        [mixture.clips for mixture in plan.mixtures],
        run.settings,
        flow_shift=args.flow_shift,
        batch_size=args.train_batch_size,
        conditioning_scale=args.conditioning_scale,
    )
    quiet = args.dry_run and run.checkpoint is not None  # the first leg has warned
    sample_plan = plan_samples(plan.real, plan.cg, plan.scenes, real, cg, args.num_samples, quiet)
    return ChosenClips(real, cg, conditions, sample_plan)


def train(run: Run) -> Plan:
    """Train from the first check to final/. Return the run's plan, which --dry_run needs."""
    args, accelerator, progress = run.args, run.accelerator, run.progress
    device, weight_dtype = run.device, run.weight_dtype

    # ------------------------------------------------------------------------------------------------ 1. refuse early
    plan = check_phase2(run)  # access, datasets, batches, memory, disk, backbone, checkpoint; no model is loaded

    # -------------------------------------------------------------------------------------------------------- 2. data
    control_dtype = weight_dtype if args.cache_control_features else None
    clips = encode_until_usable(run, plan, choose_clips, control_dtype)
    control_settings = ControlSettings.of(run.settings, args.dinov3, control_dtype) if control_dtype else None
    real, cg = (
        ClipDataset(domain_clips, run.settings, with_control=True, control_settings=control_settings)
        for domain_clips in (clips.real, clips.cg)
    )
    sampler = MixedCGRealSampler(
        real,
        cg,
        cg_ratio=args.cg_ratio,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=run.num_groups,
        process_index=run.group_index,
        buckets=np.concatenate([clips.real.bucket_numbers, clips.cg.bucket_numbers]),
        real_parts=plan.real.parts(clips.real),
        cg_parts=plan.cg.parts(clips.cg) if plan.cg else None,
    )
    batches = TrainBatches(run, ConcatDataset([real, cg]), sampler)

    # ------------------------------------------------------------------------------------------------------ 3. models
    dinov3 = DINOv3FeatureExtractor.from_pretrained(args.dinov3, torch_dtype=weight_dtype).to(device)
    projection = None
    if args.control_projection is not None and run.checkpoint is None:  # a checkpoint holds it

        def features(frames):
            return dinov3(to_device(frames, device)[None])[0].flatten(1, 2)  # (F, h·w, Dd)

        def fit():
            with run.timings.measure("projection"):
                return fit_projection(
                    *(plan.real, plan.cg, run.settings, features, args.seed),
                    dinov3=plan.inputs["DINOv3"],
                    num_directions=args.control_directions,
                    watchdog=run.watchdog,
                )

        projection = obtain_projection(
            *(args.control_projection, args.output_dir, plan.feature_dim, args.control_directions),
            *(fit, accelerator, run.watchdog),
        )
    # Processes that read no weights need the same modules.
    empty = not reads_weights(accelerator)
    backbone = load_transformer(plan.backbone, args.pretrained_model_name_or_path, weight_dtype, empty=empty)
    set_seed(args.seed)  # again: encoding has drawn random numbers, depending on what was cached
    if run.checkpoint is not None:
        controlnet = load_controlnet(run.checkpoint / "model", empty=empty)
    elif args.resume_controlnet_from is not None:
        controlnet = load_control_start(args.resume_controlnet_from, backbone.config, empty=empty)
        replaced = projection is not None and controlnet.config.control_directions is not None
        run.info(f"the control starts from {args.resume_controlnet_from}{', without its projection' * replaced}")
    else:
        controlnet = C2RControlNet.from_transformer(
            *(backbone, args.control_layers, args.control_stride),
            feature_dim=plan.feature_dim,
            empty=empty,
            injection=args.injection,
            causal_control=args.causal_control,
        )
    if projection is not None:
        controlnet.set_projection(projection)
    num_directions = controlnet.config.control_directions
    if num_directions is not None:
        run.info(f"the control is projected on {num_directions} directions of DINOv3's features")
    # One module, because an engine such as DeepSpeed wraps one.
    joined = C2RTransformer(backbone, controlnet)
    if args.offload_backbone or args.fp8_backbone:
        store_blocks(backbone.blocks, device, args.offload_backbone, args.fp8_backbone)
    model: nn.Module = joined
    classifier = None
    if args.adversarial_weight > 0:
        classifier = DomainClassifier(backbone.config.out_channels)
        if run.checkpoint is not None:
            load_domain_classifier(run.checkpoint, classifier)
        model = WithAdversary(joined, classifier)
    state = build_train_state(run, model, backbone, trainable=controlnet, domain_classifier=classifier)
    frozen_before = local_fingerprint(backbone, state.model)

    # ------------------------------------------------------------------------------------------------------ 4. resume
    # The checkpoint decides over weights (read above), moments, sampler and step; the command line over everything
    # else, the learning rate, its schedule and --cg_ratio included (`Option.on_resume`). check_phase2 has refused
    # another dataset, backbone or DINOv3, or option that must not change.
    controller = RatioController(args.monitor_bound, args.monitor_patience, args.cg_ratio_min)
    progress.inputs, progress.controller = plan.inputs, controller.state_dict()
    progress.cg_ratio = progress.requested_cg_ratio = args.cg_ratio
    resume(run, state, sampler)
    controller.load_state_dict(progress.controller)
    if progress.requested_cg_ratio != args.cg_ratio:
        sampler.set_cg_ratio(args.cg_ratio)
        progress.cg_ratio = progress.requested_cg_ratio = args.cg_ratio
    run.start_training()

    # -------------------------------------------------------------------------------------------------- 5. evaluation
    def evaluate():
        if run.validation_is_due():
            validate(run, state, clips.conditions, dinov3, plan, sampler.realised_cg_share)
        if run.sampling_is_due():
            sample(run, state, clips.sample_plan, dinov3, plan, controller, sampler)

    evaluate()

    # ---------------------------------------------------------------------------------------------------- 6. the loop
    noise = NoiseSettings.of(run)
    copies = args.context_parallel_degree  # processes that train on the same clips
    log = StepLog(accelerator, progress.logs, copies=copies)
    guard = StepGuard(accelerator, progress, args.max_skipped_steps, copies)
    for _ in run.steps("phase 2"):
        log.start()
        for draw, batch in batches.of_one_step():
            noisy = make_noisy_batch(batch, noise, draw, real.empty_prompt_embeds, device)
            domains = to_device(batch["domain"], device)  # (B,) 0 real, 1 CG
            if args.cache_control_features:
                control_features = to_device(batch["control_features"], device)  # (B, F, h, w, Dd)
            else:
                control_frames = to_device(batch["control_frames"], device).float() / 255  # (B, F, 3, H, W)
                control_features = dinov3(
                    augment_real_control(control_frames, batch["domain"], args.control_augmentation, args.seed, draw)
                )
                del control_frames  # otherwise they would stay on the device during the step
            # A dropped control is zero features, not a branch left out: guidance must know what no control looks like.
            control_features[noisy.dropped_control] = 0
            tail = {}
            if (kept := kept_directions(num_directions, args.control_tail_drop, args.seed, draw)) is not None:
                tail["kept_directions"] = to_device(kept, device)
            inputs = (noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds, control_features)
            with accelerator.accumulate(state.model):
                if classifier is None:
                    prediction = state.model(*inputs, args.conditioning_scale, **tail)
                else:
                    # Only the gradient of CG samples is reversed: real samples look as they should.
                    prediction = state.model(
                        *(*inputs, args.conditioning_scale, args.adversarial_weight * domains), **tail
                    )
                losses = noisy.weights * flow_matching.velocity_loss(prediction.sample, noisy.velocity_target)  # (B,)
                weighted_losses = domain_weights(domains, args.real_weight, progress.cg_ratio) * losses
                loss = weighted_losses.mean()
                if classifier is not None:
                    # Without a control there is no CG input whose look could leak.
                    counted = ~noisy.dropped_control
                    domain_losses = domain_loss(prediction.domain_logits, domains, counted, progress.cg_ratio)
                    loss = loss + domain_losses.mean()
                    log.add_domain_logits(domain_losses, prediction.domain_logits, batch["domain"], counted)
                accelerator.backward(loss)
                guard.add(losses, batch["name"])
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, state, args.max_grad_norm)
                    # DeepSpeed has stepped or skipped in backward() already, by the same norm.
                    if guard.may_step(grad_norm):
                        state.optimizer.step()
                        step_ema(state.ema, controlnet)
                    state.optimizer.zero_grad()
            log.add(losses, noisy.sigmas, batch["domain"])
            log.add_weighted(weighted_losses, batch["domain"])
        finish_step(run, state, log, guard, grad_norm, cg_share=sampler.realised_cg_share)
        evaluate()
        if run.checkpoint_is_due():
            save_checkpoint(run, state, sampler)
    run.end_training()

    # -------------------------------------------------------------------------------------------------- 7. final save
    if local_fingerprint(backbone, state.model) != frozen_before:
        raise RuntimeError("the frozen backbone has changed")
    with evaluating(run, state, "final"):
        save(run, state, plan, "final")
    run.close()
    return plan


def validate(
    run: Run,
    state: TrainState,
    conditions: ControlConditions,
    dinov3: DINOv3FeatureExtractor,
    plan: Plan,
    cg_share: float,
):
    """Measure the loss on held-out clips with right and wrong conditions; save best/ if it is the best so far."""
    with evaluating(run, state, "validation"):
        losses = conditions.losses(state.model, dinov3, run.accelerator, lambda: run.go_on("validation"))
        metrics = record_validation(run, losses, conditions, cg_share=cg_share)
        if metrics is None:
            return
        projected = state.trainable.config.control_directions is not None
        if warning := leak_warning(metrics, run.args.control_augmentation, projected):
            run.info(warning)
        if run.progress.record_best(run.args.best_by):
            save(run, state, plan, "best")


def sample(
    run: Run,
    state: TrainState,
    sample_plan: SamplePlan,
    dinov3: DINOv3FeatureExtractor,
    plan: Plan,
    controller: RatioController,
    sampler: MixedCGRealSampler,
):
    """Make this step's sample videos, judge them by the CG monitor, and lower the CG share if they look like CG."""
    args = run.args
    sampling = Sampling(
        args.num_inference_steps,
        args.guidance,
        args.guidance_scale,
        args.control_guidance_scale,
        args.conditioning_scale,
    )
    with evaluating(run, state, "sampling"):
        rows, cg_look = sample_and_judge(run, state, sample_plan, sampling, dinov3, plan)
        if rows is None:
            return
        write_samples(rows, sample_plan.samples, args.output_dir, args.fps, run.accelerator, run.progress.global_step)
    run.progress.sampled_step = run.progress.global_step
    if cg_look is not None:
        record_cg_look(run, cg_look, controller, sampler)


def save(run: Run, state: TrainState, plan: Plan, name: str):
    """Save the ControlNet as best/ or final/."""
    save_model(
        run,
        state,
        name,
        phase=2,
        mixtures=plan.mixtures,
        backbone=plan.backbone,
        backbone_sha256=plan.inputs["backbone"],
        backbone_base=lora.backbone if (lora := find_lora(plan.backbone)) else None,
        dinov3=run.args.dinov3,
        conditioning_scale=run.args.conditioning_scale,
        guidance=run.args.guidance,
        guidance_scale=run.args.guidance_scale,
        control_guidance_scale=run.args.control_guidance_scale,
        control_certificate=state.trainable.config.control_certificate,
    )


def main():
    launch(train, cli.parse(PHASE2))


if __name__ == "__main__":
    cli.run(main)
