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
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import WanTransformer3DModel
from torch.utils.data import ConcatDataset, DataLoader
from tqdm import tqdm

from c2r import InputError, flow_matching
from c2r.checkpoint import (
    agree_on_checkpoint,
    load_checkpoint,
    load_domain_classifier,
    lock_output_dir,
    require_resumable,
    save_checkpoint,
)
from c2r.data.cache import encoder_fingerprint
from c2r.data.dataset import ClipDataset
from c2r.data.manifest import read_manifest
from c2r.dry_run import RunRecord, dry_run, few
from c2r.ema import averaged_weights, build_ema, step_ema
from c2r.encode import count_missing, encode_missing
from c2r.engine import (
    build_accelerator,
    failing_together,
    gathered_state_dict,
    local_fingerprint,
    prepare,
    reads_weights,
)
from c2r.guards import StepGuard
from c2r.interruption import EXIT_STOPPED, Interruption, shield_worker
from c2r.models.assembly import (
    check_transformer,
    load_controlnet,
    load_transformer,
    read_transformer_config,
    resolve_model_folder,
    save_phase,
)
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet, injection_layers
from c2r.models.dinov3 import DINOv3FeatureExtractor, check_dinov3
from c2r.models.domain_classifier import DomainClassifier, domain_loss
from c2r.models.transformer import C2RTransformer
from c2r.optimizer import build_lr_scheduler, build_optimizer
from c2r.options import HelpFormatter, add_common_options, parse_options, run
from c2r.preflight import count_parameters, fingerprint_backbone, preflight, require_access, require_encoders
from c2r.sampler import MixedCGRealSampler
from c2r.training import (
    LoopState,
    StepLog,
    build_contract,
    domain_weights,
    frozen_dtype,
    in_full_precision,
    make_noisy_batch,
    start_logs,
    under_autocast,
)
from c2r.validation import choose_validation_clips, clip_losses, control_metrics, other_clips
from c2r.watchdog import Watchdog


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_common_options(
        parser,
        train_batch_size=1,
        gradient_accumulation_steps=1,
        max_train_steps=15_000,
        learning_rate=5e-6,
    )
    group = parser.add_argument_group("phase 2")
    group.add_argument(
        "--resume_backbone_from",
        required=True,
        help="the backbone: a phase 1 best/ or final/, a Diffusers transformer folder or a .safetensors file",
    )
    group.add_argument("--cg_dataset", help="folder with CG pairs: metadata.csv with file_name, control_name, text")
    group.add_argument("--cg_ratio", type=float, default=0.2, help="share of CG samples, exact over the run")
    group.add_argument("--dinov3", default="facebook/dinov3-vitb16-pretrain-lvd1689m", help="a folder or a hub id")
    group.add_argument("--control_layers", type=int, default=15, help="number of ControlNet blocks")
    group.add_argument(
        "--control_stride", type=int, default=1, help="1 injects after the first blocks, 3 after every third"
    )
    group.add_argument("--conditioning_scale", type=float, default=1.0, help="multiplies the residuals")
    group.add_argument(
        "--control_dropout", type=float, default=0.1, help="share of samples trained with blank control"
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
    feature_dim, dinov3_parameters = check_dinov3(args.dinov3, args.height, args.width)
    with watchdog.main_process_first():  # the others find in the cache what the first has looked into
        real = read_manifest(args.real_dataset, "real", args)
        cg = read_manifest(args.cg_dataset, "cg", args) if args.cg_ratio > 0 else None
    manifests = [real, cg] if cg else [real]
    if accelerator.is_main_process:
        for manifest in manifests:
            manifest.report()
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
    real_clips, cg_clips = (few(m.train, args, accelerator) if m else [] for m in (real, cg))
    validation_clips = [
        clip for manifest in manifests for clip in choose_validation_clips(manifest, args.num_validation_clips)
    ]
    other_validation_clips = other_clips(validation_clips, [clip for manifest in manifests for clip in manifest.clips])
    if args.dry_run:
        planned = [clip for manifest in manifests for clip in manifest.train]
        record.clips_to_encode = count_missing(planned + validation_clips, args)
    record.seconds_per_clip = encode_missing(real_clips + cg_clips + validation_clips, args, accelerator, watchdog)
    real_dataset = ClipDataset(real_clips, args, with_control=True)
    cg_dataset = ClipDataset(cg_clips, args, with_control=True)
    validation_dataset = ClipDataset(validation_clips, args)
    sampler = MixedCGRealSampler(
        real_dataset,
        cg_dataset,
        cg_ratio=args.cg_ratio,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
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
    loop = LoopState(inputs=inputs, cg_ratio=args.cg_ratio)

    # -------------------------------------------------------------------------------------------------------- resume
    # The checkpoint decides over weights (read above), optimizer, schedule, sampler and step; the command line over
    # all the rest, cg_ratio included. Datasets, backbone and DINOv3 must be the same.
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, optimizer, lr_scheduler, sampler, loop, ema)
        if loop.cg_ratio != args.cg_ratio:
            sampler.set_cg_ratio(args.cg_ratio)
            loop.cg_ratio = args.cg_ratio
        accelerator.print(f"resumed from {checkpoint} at step {loop.global_step}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting at step 0")
    start_logs(accelerator, args, loop)
    interruption = Interruption(args)

    def control_features_of(control_frames):
        """(B, F, 3, H, W) uint8 -> (B, F, h, w, Dd), without a graph."""
        return dinov3(control_frames.to(device).float() / 255)

    # ---------------------------------------------------------------------------------------------------- validation
    def go_on():
        watchdog.beat(f"step {loop.global_step}: validation")
        return interruption.agree(accelerator)

    def validate():
        model.eval()

        def losses(control_clips):
            control_of = ClipDataset(control_clips, args).control_frames

            def predictor_of(batch):
                prompt_embeds = batch["prompt_embeds"].to(device)
                control_features = control_features_of(torch.stack([control_of(i) for i in batch["index"]]))
                return lambda noisy, timesteps: model(
                    noisy, timesteps, prompt_embeds, control_features, args.conditioning_scale
                )

            return clip_losses(
                validation_dataset,
                predictor_of,
                accelerator,
                args.flow_shift,
                args.train_batch_size,
                go_on=go_on,
            )

        with averaged_weights(ema, controlnet, model):
            right = losses(validation_clips)
            other = losses(other_validation_clips) if right is not None else None
            model.train()
            if other is None:
                return
            metrics = control_metrics(right, other, [clip.domain for clip in validation_clips])
            # Before the first step the ControlNet is silent: its loss is the backbone's own, without control.
            metrics["loss_no_control"] = loop.metrics.get("loss_no_control", metrics["loss"])
            metrics["cg_share"] = sampler.realised_cg_share
            loop.validated_step, loop.metrics = loop.global_step, metrics
            accelerator.log({f"validation/{name}": value for name, value in metrics.items()}, loop.global_step)
            if accelerator.is_main_process:
                tqdm.write(
                    f"step {loop.global_step}: validation loss {metrics['loss']:.4f}, "
                    f"control gain {metrics['control_gain']:.4f}"
                )
            if loop.is_best(metrics["loss"]):
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

    if loop.validation_due(args):
        with record.time("validation"):
            validate()

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
            control_features = control_features_of(batch["control_frames"])  # (B, F, h, w, Dd)
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
    accelerator.print(f"final/ and best/ (validation loss {loop.best_validation_loss:.4f}) are in {args.output_dir}")
    watchdog.close()


def main():
    args = parse_options(build_parser())
    if args.cg_ratio > 0 and args.cg_dataset is None:
        raise InputError(
            f"--cg_ratio {args.cg_ratio}: needs --cg_dataset, a folder with CG pairs; or give --cg_ratio 0"
        )
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
