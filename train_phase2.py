"""Phase 2: ground the control on mixed CG and real video, over the frozen backbone of phase 1.

    accelerate launch train_phase2.py --resume_backbone_from outputs/phase1/best \\
        --real_dataset data/real --cg_dataset data/cg --cg_ratio 0.2 --output_dir outputs/phase2

Trains the control adapter, the ControlNet blocks and their projector MLPs on frozen DINOv3 features. CG samples are
pairs (coarse control, fine target); real clips are their own control. best/ and final/ hold the ControlNet alone and
name the backbone that it belongs to.
"""

import argparse
import math
import sys
from itertools import chain
from pathlib import Path

import numpy as np
from accelerate.utils import set_seed
from diffusers import WanTransformer3DModel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from c2r import InputError, flow_matching
from c2r.cli import EXIT_STOPPED, HelpFormatter, run
from c2r.data.buckets import buckets_of
from c2r.data.mixture import read_on_all, read_sources
from c2r.data.workers import shield_worker
from c2r.encoding.cache import ControlSettings, encoder_fingerprint
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_control, encode_missing
from c2r.encoding.missing import find_missing, find_missing_control
from c2r.evaluation.monitor import MIN_FILES, CGMonitor, RatioController
from c2r.evaluation.monitor_reference import can_monitor, choose_reference_clips, judge_samples, reference_of
from c2r.evaluation.samples import choose_samples, make_samples, sampling_pipeline, write_samples
from c2r.evaluation.validation import ControlConditions, choose_validation_clips, leak_warning, validation_metrics
from c2r.evaluation.validation_plot import show_history
from c2r.models.adversary import DomainClassifier, domain_loss
from c2r.models.assembly import check_transformer, load_controlnet, load_transformer, read_transformer_config
from c2r.models.contract import save_phase
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet, injection_layers
from c2r.models.dinov3 import DINOv3FeatureExtractor, check_dinov3
from c2r.models.hub import resolve_model_folder
from c2r.models.transformer import C2RTransformer
from c2r.options import (
    add_common_options,
    add_dinov3_option,
    add_sampling_options,
    check_sampling_options,
    parse_options,
)
from c2r.sampler import MixedCGRealSampler
from c2r.training.checkpoint import (
    agree_on_checkpoint,
    load_checkpoint,
    load_domain_classifier,
    lock_output_dir,
    require_resumable,
    save_checkpoint,
)
from c2r.training.dry_run import RunRecord, dry_run, few
from c2r.training.ema import averaged_weights, build_ema, step_ema
from c2r.training.engine import (
    build_accelerator,
    failing_together,
    gathered_state_dict,
    local_fingerprint,
    prepare,
    reads_weights,
)
from c2r.training.guard import StepGuard
from c2r.training.interruption import Interruption
from c2r.training.logs import StepLog, start_logs
from c2r.training.optimizer import build_lr_scheduler, build_optimizer
from c2r.training.precision import frozen_dtype, in_full_precision, under_autocast
from c2r.training.preflight import count_parameters, fingerprint_backbone, preflight, require_access, require_encoders
from c2r.training.run import LoopState, build_contract, tell_small_buckets
from c2r.training.step import augment_real_control, domain_weights, make_noisy_batch
from c2r.training.watchdog import Watchdog


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_common_options(
        parser,
        train_batch_size=1,
        gradient_accumulation_steps=1,
        max_train_steps=15_000,
        learning_rate=5e-6,
        # Under 3 % of a run at batch 1, see benchmarks/validation_share.py.
        validation_steps=1500,
        num_validation_clips=4,
    )
    group = parser.add_argument_group("phase 2")
    group.add_argument(
        "--resume_backbone_from",
        required=True,
        help="the backbone: a phase 1 best/ or final/, a Diffusers transformer folder or a .safetensors file",
    )
    group.add_argument(
        "--cg_dataset",
        nargs="+",
        metavar="FOLDER[:WEIGHT]",
        help="folder or address with CG pairs: metadata.csv with file_name, control_name, text; or several",
    )
    group.add_argument("--cg_ratio", type=float, default=0.2, help="share of CG samples, exact over the run")
    add_dinov3_option(group)
    group.add_argument(
        "--cache_control_features",
        action="store_true",
        help="run DINOv3 once for each clip, not in each step: 194 MB a clip of 480x832x81 on disk",
    )
    group.add_argument("--control_layers", type=int, default=15, help="number of ControlNet blocks")
    group.add_argument(
        "--control_stride", type=int, default=1, help="1 injects after the first blocks, 3 after every third"
    )
    group.add_argument("--conditioning_scale", type=float, default=1.0, help="multiplies the residuals")
    group.add_argument(
        "--control_dropout", type=float, default=0.1, help="share of samples trained with blank control"
    )
    group.add_argument(
        "--best_by",
        default="loss",
        choices=("loss", "control_gain"),
        help="best/ is the lowest validation loss, or the highest control gain",
    )
    group = parser.add_argument_group("against a CG look")
    group.add_argument(
        "--real_weight", type=float, default=1.0, help="loss weight of a real sample relative to a CG one, e.g. 2"
    )
    group.add_argument(
        "--adversarial_weight",
        type=float,
        default=0.0,
        help="train against a classifier that tells CG samples' predicted latents from real ones', e.g. 0.1; 0: off",
    )
    group.add_argument(
        "--control_augmentation",
        type=float,
        default=0.0,
        help="share of real clips whose control is altered in its look (never in its geometry), against leaking",
    )
    group = parser.add_argument_group("sample videos and CG monitor")
    group.add_argument("--num_samples", type=int, default=4, help="videos made at each sampling; 0: none, no monitor")
    group.add_argument("--sample_steps", type=int, default=2500, help="optimizer steps between samplings")
    group.add_argument(
        "--sample_dataset",
        help="coarse videos to sample from, a folder like --cg_dataset with the captions to be used as prompts; "
        "default: held-out CG pairs with captions of held-out real clips",
    )
    add_sampling_options(group, num_inference_steps=20)
    group.add_argument(
        "--monitor_bound",
        type=float,
        default=0.5,
        help="of the samples' CG look: 0 as the real clips, 1 as the CG ones",
    )
    group.add_argument(
        "--monitor_patience", type=int, default=3, help="samplings above the bound until it is acted or advised upon"
    )
    group.add_argument(
        "--cg_ratio_min", type=float, help="halve --cg_ratio down to this while the CG look is above the bound"
    )
    return parser


def train(args, accelerator, record):
    """All of phase 2, from top to bottom; `record` (`RunRecord`) is for a dry run, which calls it twice."""
    # --------------------------------------------------------------------------------------------------- output folder
    watchdog = Watchdog(accelerator, 60 * args.distributed_timeout_minutes)
    set_seed(args.seed)
    device, weight_dtype = accelerator.device, frozen_dtype(args)
    lock = lock_output_dir(accelerator, args.output_dir)  # noqa: F841  held while this process lives
    checkpoint, skipped = agree_on_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    for line in skipped:
        accelerator.print(line)

    # ----------------------------------------------------------------------------------------------------- preflight
    # What can be refused is refused here, the cheapest first; no more of the weights is read than a fingerprint.
    require_access(args.pretrained_model_name_or_path, args.dinov3)
    backbone_config = read_transformer_config(args.resume_backbone_from, args.pretrained_model_name_or_path)
    layers = injection_layers(args.control_layers, args.control_stride, backbone_config["num_layers"])
    feature_dim, dinov3_parameters = check_dinov3(args.dinov3, [bucket[1:] for bucket in buckets_of(args)])

    def read():
        real = read_sources(args.real_dataset, "real", args)
        cg = read_sources(args.cg_dataset, "cg", args) if args.cg_dataset else None
        scenes = read_sources([args.sample_dataset], "cg", args) if args.sample_dataset else None
        return real, cg, scenes

    real, cg, scenes = read_on_all(read, accelerator, watchdog)
    manifests = [real, cg] if cg else [real]
    config = {name: backbone_config[name] for name in SHARED_CONFIG}
    config |= {"injection_layers": layers, "feature_dim": feature_dim}
    record.trainable = count_parameters(C2RControlNet, config)
    preflight(
        accelerator,
        args,
        manifests=manifests,
        config=backbone_config,
        trainable=record.trainable,
        frozen=count_parameters(WanTransformer3DModel, backbone_config) + dinov3_parameters,
    )
    inputs = {f"{manifest.domain} dataset": manifest.fingerprint for manifest in manifests}
    inputs["DINOv3"] = encoder_fingerprint(resolve_model_folder(args.dinov3))
    if checkpoint is not None:
        require_resumable(checkpoint, accelerator, args, config, inputs)
    require_encoders(args.pretrained_model_name_or_path)
    check_transformer(args.resume_backbone_from, args.pretrained_model_name_or_path)
    backbone_sha256 = fingerprint_backbone(accelerator, args.resume_backbone_from, args.pretrained_model_name_or_path)
    inputs["backbone"] = backbone_sha256
    if checkpoint is not None:  # again, with what took long to read
        require_resumable(checkpoint, accelerator, args, config, inputs)

    # ---------------------------------------------------------------------------------------------------------- data
    while True:
        real_clips = few(real.train, args, accelerator)
        cg_clips = few(cg.train, args, accelerator) if cg else real_clips[:0]
        validation_clips = [
            clip for sources in manifests for clip in choose_validation_clips(sources, args.num_validation_clips)
        ]
        conditions = ControlConditions(validation_clips, [sources.clips for sources in manifests], args)
        if scenes:
            samples = choose_samples(scenes.clips, None, args.num_samples)
        else:
            samples = choose_samples((cg or real).held_out, real.held_out if cg else None, args.num_samples)
        sample_clips = [clip for sample in samples for clip in (sample.scene, sample.caption)]
        if args.dry_run:
            planned = chain(*(sources.train for sources in manifests), conditions.to_encode, sample_clips)
            record.plan_encoding(find_missing(planned, args))
            if args.cache_control_features:
                planned = chain(*(sources.train for sources in manifests))
                record.plan_encoding(find_missing_control(planned, args, weight_dtype))
        to_encode = chain(real_clips, cg_clips, conditions.to_encode, sample_clips)
        passes = [encode_missing(to_encode, args, accelerator, watchdog)]
        if args.cache_control_features:
            to_encode = chain(real_clips, cg_clips)
            passes.append(encode_control(to_encode, args, weight_dtype, accelerator, watchdog))
        record.add_encoding(*passes)
        if not any(encoded.failures for encoded in passes):
            break
        real, cg, scenes = read_on_all(read, accelerator, watchdog)  # without them
        manifests = [real, cg] if cg else [real]
        inputs |= {f"{sources.domain} dataset": sources.fingerprint for sources in manifests}
        if checkpoint is not None:
            require_resumable(checkpoint, accelerator, args, config, inputs)
    sample_bucket = samples[0].scene.bucket if samples else None
    reference_clips = choose_reference_clips(real_clips, cg_clips, sample_bucket)
    monitored = bool(samples) and can_monitor(reference_clips)
    if samples and not monitored and not args.dry_run:
        accelerator.print(
            f"CG monitor: off, it needs clips of at least {MIN_FILES} real and {MIN_FILES} CG videos to train on, of "
            f"the samples' bucket {sample_bucket}"
        )
    control_settings = ControlSettings.from_options(args, weight_dtype) if args.cache_control_features else None
    real_dataset = ClipDataset(real_clips, args, with_control=True, control_settings=control_settings)
    cg_dataset = ClipDataset(cg_clips, args, with_control=True, control_settings=control_settings)
    sampler = MixedCGRealSampler(
        real_dataset,
        cg_dataset,
        cg_ratio=args.cg_ratio,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        buckets=np.concatenate([real_clips.bucket_numbers, cg_clips.bucket_numbers]),
        real_sources=real.parts(real_clips),
        cg_sources=cg.parts(cg_clips) if cg else None,
    )
    tell_small_buckets(accelerator, sampler, real_clips.buckets)
    # Not prepared by Accelerate: the sampler has given this process its share already.
    train_loader = DataLoader(
        ConcatDataset([real_dataset, cg_dataset]),
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=shield_worker,
        collate_fn=real_dataset.collate,
        pin_memory=device.type == "cuda",
    )

    # ------------------------------------------------------------------------------------------- models and optimizer
    dinov3 = DINOv3FeatureExtractor.from_pretrained(args.dinov3, torch_dtype=weight_dtype).to(device)
    empty = not reads_weights(accelerator)
    backbone = load_transformer(
        args.resume_backbone_from, args.pretrained_model_name_or_path, weight_dtype, empty=empty
    )
    # Seeded here again: how much was drawn before depends on what the cache lacked.
    set_seed(args.seed)
    if checkpoint is not None and not empty:
        controlnet = load_controlnet(checkpoint / "model")
    else:
        controlnet = C2RControlNet.from_transformer(
            backbone, args.control_layers, args.control_stride, feature_dim=feature_dim, empty=empty
        )
    domain_classifier = DomainClassifier(backbone.config.out_channels) if args.adversarial_weight > 0 else None
    if domain_classifier and checkpoint is not None:
        load_domain_classifier(checkpoint, domain_classifier)
    # One module: an engine such as DeepSpeed wraps one.
    model = C2RTransformer(backbone, controlnet, domain_classifier).train()
    if args.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    in_full_precision(backbone.condition_embedder.time_embedder, device)
    under_autocast(model, device, args)
    optimizer = build_optimizer(controlnet, args, device, domain_classifier)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    model, optimizer = prepare(accelerator, model, optimizer)
    weights_before = local_fingerprint(backbone, model)
    ema = build_ema(controlnet, args.ema_decay)
    controller = RatioController(args.monitor_bound, args.monitor_patience, args.cg_ratio_min)
    loop = LoopState(
        inputs=inputs, cg_ratio=args.cg_ratio, asked_cg_ratio=args.cg_ratio, controller=controller.state_dict()
    )

    # -------------------------------------------------------------------------------------------------------- resume
    # The checkpoint decides over weights (read above), optimizer, schedule, sampler and step; the command line over
    # all the rest, cg_ratio included. Datasets, backbone and DINOv3 must be the same.
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, optimizer, lr_scheduler, sampler, loop, ema)
        controller.load_state_dict(loop.controller)
        if loop.asked_cg_ratio != args.cg_ratio:
            sampler.set_cg_ratio(args.cg_ratio)
            loop.cg_ratio = loop.asked_cg_ratio = args.cg_ratio
        accelerator.print(f"resumed from {checkpoint} at step {loop.global_step}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting at step 0")
    start_logs(accelerator, args, loop)
    interruption = Interruption(args)

    def say(line):
        if accelerator.is_main_process:
            tqdm.write(line)

    # ---------------------------------------------------------------------------------------------------- validation
    def go_on():
        watchdog.beat(f"step {loop.global_step}: validation and samples")
        return interruption.agree(accelerator)

    def validate():
        model.eval()
        with averaged_weights(ema, controlnet, model):
            losses = conditions.losses(model, dinov3, accelerator, go_on)
            model.train()
            if losses is None:
                return
            metrics = validation_metrics(losses, [clip.domain for clip in validation_clips], args.flow_shift)
            metrics["cg_share"] = sampler.realised_cg_share
            loop.add_validation(metrics)
            accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, loop.global_step)
            with failing_together(accelerator, args.output_dir):
                if accelerator.is_main_process:
                    show_history(loop.history, accelerator, args.output_dir)
            say(
                f"step {loop.global_step}: validation loss {metrics['loss']:.4f}, "
                f"control gain {metrics['control_gain']:.4f}"
            )
            if warning := leak_warning(metrics, args.control_augmentation):
                say(f"step {loop.global_step}: {warning}")
            if loop.is_best(args.best_by):
                save("best")

    def save(name):
        folder = Path(args.output_dir) / name
        weights = gathered_state_dict(accelerator, controlnet, optimizer)
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                contract = build_contract(
                    args,
                    loop,
                    phase=2,
                    base_model=args.pretrained_model_name_or_path,
                    manifests=manifests,
                    backbone=args.resume_backbone_from,
                    backbone_sha256=backbone_sha256,
                    dinov3=args.dinov3,
                    conditioning_scale=args.conditioning_scale,
                )
                save_phase(folder, controlnet, contract, weights)

    def sample():
        model.eval()
        transformer, judged = accelerator.unwrap_model(model), None
        with (
            averaged_weights(ema, controlnet, model),
            sampling_pipeline(args, transformer, dinov3, device) as pipeline,
        ):
            rows = make_samples(samples, pipeline, args, accelerator, backbone_sha256, go_on)
            if rows is not None and monitored:
                reference = reference_of(
                    reference_clips, pipeline, inputs["DINOv3"], args, accelerator, cg.cache_dir, watchdog.beat
                )
                judged = judge_samples(rows, samples, CGMonitor(reference), dinov3, accelerator)
        model.train()
        if rows is None:
            return
        write_samples(rows, samples, args, accelerator, loop.global_step)
        loop.sampled_step = loop.global_step
        if judged is None:
            return
        say(f"step {loop.global_step}: {judged}")
        ratio = controller.step(judged.look, loop.cg_ratio)
        if ratio < loop.cg_ratio:
            # So far ahead that the order of samples does not depend on how many batches are loaded by now.
            sampler.set_cg_ratio(ratio, ahead=2 * args.dataloader_num_workers)
            say(f"step {loop.global_step}: cg_ratio lowered from {loop.cg_ratio:g} to {ratio:g}")
            loop.cg_ratio = ratio
        elif advice := controller.advice(judged.look, loop.cg_ratio):
            say(f"step {loop.global_step}: {advice}")
        loop.controller = controller.state_dict()
        loop.look = judged.scalars() | {"cg_ratio": loop.cg_ratio}
        accelerator.log({f"monitor/{name}": value for name, value in loop.look.items()}, loop.global_step)

    record.start()
    if loop.validation_due(args):
        with record.time("validation"):
            validate()
    if loop.sampling_due(args):  # a run that was stopped after its validation
        with record.time("sampling"):
            sample()

    # ------------------------------------------------------------------------------------------------------ training
    progress = tqdm(
        total=args.max_train_steps,
        initial=loop.global_step,
        desc="phase 2",
        disable=not accelerator.is_local_main_process,
    )
    micro_step = loop.global_step * args.gradient_accumulation_steps
    step_log, guard = StepLog(accelerator, loop.logs), StepGuard(accelerator, loop, args.max_skipped_steps)
    batches = iter(train_loader)
    while loop.global_step < args.max_train_steps and interruption.stop is None:
        step_log.start()
        for _ in range(args.gradient_accumulation_steps):
            watchdog.beat(f"step {loop.global_step + 1}: data")
            batch = next(batches)
            sampler.mark_consumed()
            noisy = make_noisy_batch(
                batch,
                args,
                empty_prompt_embeds=real_dataset.empty_prompt_embeds,
                micro_step=micro_step,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                device=device,
            )
            if args.cache_control_features:
                control_features = batch["control_features"].to(device)  # (B, F, h, w, Dd)
            else:
                control_frames = augment_real_control(
                    batch["control_frames"].to(device).float() / 255,  # (B, F, 3, H, W)
                    batch["domain"],
                    args,
                    micro_step=micro_step,
                    process_index=accelerator.process_index,
                )
                control_features = dinov3(control_frames)
            # A blank control goes through the branch as zero features: guidance must know what no control looks like.
            control_features[noisy.dropped_control] = 0
            watchdog.beat(f"step {loop.global_step + 1}: forward and backward")
            domains = batch["domain"].to(device)  # (B,) 0 real, 1 CG
            with accelerator.accumulate(model):
                prediction = model(
                    noisy.noisy_latents,
                    noisy.timesteps,
                    noisy.prompt_embeds,
                    control_features,
                    args.conditioning_scale,
                    # CG samples alone are drawn over to the other side: real ones look as they should.
                    reversal_strength=args.adversarial_weight * domains if domain_classifier else None,
                )
                velocity_pred, domain_logits = prediction if domain_classifier else (prediction, None)
                losses = noisy.weights * flow_matching.velocity_loss(velocity_pred, noisy.velocity_target)  # (B,)
                weighted_losses = domain_weights(domains, args.real_weight, loop.cg_ratio) * losses
                loss = weighted_losses.mean()
                if domain_classifier:
                    # Without a control there is no CG input whose look could leak.
                    counted = ~noisy.dropped_control
                    domain_losses = domain_loss(domain_logits, domains, counted, loop.cg_ratio)
                    loss = loss + domain_losses.mean()
                accelerator.backward(loss)
                guard.add(losses, batch["name"])
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                    # DeepSpeed has stepped or skipped in backward(), by the same norm.
                    if guard.may_step(grad_norm):
                        optimizer.step()
                        step_ema(ema, controlnet)
                    optimizer.zero_grad()
            micro_step += 1
            step_log.add(losses, noisy.sigmas, batch["domain"])
            step_log.add_weighted(weighted_losses, batch["domain"])
            if domain_classifier:
                step_log.add_domain_logits(domain_losses, domain_logits, batch["domain"], counted)

        # One optimizer step is done: log, and at their steps validate and save.
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        loop.global_step += 1
        logs = step_log.finish(
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped_in_a_row=loop.skipped_in_a_row,
            cg_share=sampler.realised_cg_share,
        )
        logs["train/loss_spike"] = guard.finish(logs["train/loss"])
        record.samples_per_second = logs["train/samples_per_second"]
        loop.logs = logs
        accelerator.log(logs, loop.global_step)
        progress.set_postfix(loss=f"{logs['train/loss']:.4f}", cg=f"{logs['train/cg_share']:.3f}")
        progress.update()
        interruption.agree(accelerator)
        if loop.validation_due(args) and interruption.stop is None:
            with record.time("validation"):
                validate()
        if loop.sampling_due(args) and interruption.stop is None:
            with record.time("sampling"):
                sample()
        last = loop.global_step == args.max_train_steps
        if last or loop.global_step % args.checkpointing_steps == 0 or interruption.save:
            watchdog.beat(f"step {loop.global_step}: checkpoint")
            with record.time("checkpoint"):
                save_checkpoint(
                    accelerator,
                    controlnet,
                    optimizer,
                    lr_scheduler,
                    sampler,
                    loop,
                    ema,
                    args,
                    domain_classifier,
                )
            interruption.saved()
    progress.close()
    accelerator.print(f"time: {record.shares()}")
    if interruption.stop is not None:
        accelerator.print(
            f"stopped at step {loop.global_step}: {interruption.stop}; go on with --resume_from_checkpoint latest"
        )
        watchdog.close()
        accelerator.end_training()
        sys.exit(EXIT_STOPPED)

    # ---------------------------------------------------------------------------------------------------- final save
    if local_fingerprint(backbone, model) != weights_before:
        raise RuntimeError("the frozen backbone has changed")
    with averaged_weights(ema, controlnet, model):
        save("final")
    accelerator.print(f"final/ and best/ ({loop.best_text}) are in {args.output_dir}")
    watchdog.close()


def main():
    args = parse_options(build_parser())
    check_sampling_options(args)
    if args.cg_ratio > 0 and args.cg_dataset is None:
        raise InputError(
            f"--cg_ratio {args.cg_ratio}: needs --cg_dataset, a folder with CG pairs; or give --cg_ratio 0"
        )
    if args.cg_ratio_min is not None and not 0 <= args.cg_ratio_min <= args.cg_ratio:
        raise InputError(f"--cg_ratio_min {args.cg_ratio_min}: must be from 0 to --cg_ratio {args.cg_ratio}")
    if args.cache_control_features and args.control_augmentation > 0:
        raise InputError(
            f"--cache_control_features: keeps no features of the control that --control_augmentation "
            f"{args.control_augmentation} alters anew in each step; leave one of them out"
        )
    if args.monitor_patience < 1:
        raise InputError(f"--monitor_patience {args.monitor_patience}: must be at least 1")
    if not 0 < args.real_weight < math.inf:
        raise InputError(f"--real_weight {args.real_weight}: must be above 0 and finite")
    if not 0 <= args.adversarial_weight < math.inf:
        raise InputError(f"--adversarial_weight {args.adversarial_weight}: must be finite and not negative")
    if args.adversarial_weight > 0 and not 0 < args.cg_ratio < 1:
        raise InputError(
            f"--adversarial_weight {args.adversarial_weight}: tells CG from real, but --cg_ratio {args.cg_ratio} "
            "draws one of them alone; give a ratio between 0 and 1"
        )
    if args.dry_run:
        dry_run(train, args)
    else:
        accelerator = build_accelerator(args)
        train(args, accelerator, RunRecord())
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
