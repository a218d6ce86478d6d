"""Phase 1: adapt the Wan 2.1 DiT to real urban video with a flow-matching loss.

    accelerate launch train_phase1.py --real_dataset data/real --output_dir outputs/phase1

VAE and UMT5 are frozen and only loaded to encode what the cache lacks; nothing of the control path is loaded.
best/ and final/ are folders that `WanTransformer3DModel.from_pretrained` loads.
"""

import argparse
import sys
from itertools import chain
from pathlib import Path

import torch
from accelerate.utils import set_seed
from diffusers import WanTransformer3DModel
from torch.utils.data import DataLoader
from tqdm import tqdm

from c2r import flow_matching
from c2r.cli import EXIT_STOPPED, HelpFormatter, run
from c2r.data.mixture import read_on_all, read_sources
from c2r.data.workers import shield_worker
from c2r.encoding.dataset import ClipDataset
from c2r.encoding.encoding_pass import encode_missing
from c2r.encoding.missing import find_missing
from c2r.evaluation.validation import choose_validation_clips, clip_losses, other_clips, validation_metrics
from c2r.evaluation.validation_plot import show_history
from c2r.models.assembly import check_transformer, load_transformer, read_transformer_config
from c2r.models.contract import save_phase
from c2r.options import add_common_options, parse_options
from c2r.sampler import MixedCGRealSampler
from c2r.training.checkpoint import (
    agree_on_checkpoint,
    load_checkpoint,
    lock_output_dir,
    require_resumable,
    save_checkpoint,
)
from c2r.training.dry_run import RunRecord, dry_run, few
from c2r.training.ema import averaged_weights, build_ema, step_ema
from c2r.training.engine import build_accelerator, failing_together, gathered_state_dict, prepare, reads_weights
from c2r.training.guard import StepGuard
from c2r.training.interruption import Interruption
from c2r.training.logs import StepLog, start_logs
from c2r.training.optimizer import build_lr_scheduler, build_optimizer
from c2r.training.precision import in_full_precision, under_autocast
from c2r.training.preflight import count_parameters, preflight, require_access, require_encoders
from c2r.training.run import LoopState, build_contract, tell_small_buckets
from c2r.training.step import make_noisy_batch
from c2r.training.watchdog import Watchdog


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter, allow_abbrev=False)
    add_common_options(
        parser,
        train_batch_size=4,
        gradient_accumulation_steps=8,
        max_train_steps=10_000,
        learning_rate=1e-5,
    )
    parser.add_argument("--dit_path", help="start from this single-file DiT instead of the pipeline's transformer/")
    return parser


def train(args, accelerator, record):
    """All of phase 1, from top to bottom; `record` (`RunRecord`) is for a dry run, which calls it twice."""
    # --------------------------------------------------------------------------------------------------- output folder
    watchdog = Watchdog(accelerator, 60 * args.distributed_timeout_minutes)
    set_seed(args.seed)
    device = accelerator.device
    lock = lock_output_dir(accelerator, args.output_dir)  # noqa: F841  held while this process lives
    checkpoint, skipped = agree_on_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint)
    for line in skipped:
        accelerator.print(line)

    # ----------------------------------------------------------------------------------------------------- preflight
    # What can be refused is refused here, the cheapest first; not one weight is read yet.
    transformer_source = args.dit_path or args.pretrained_model_name_or_path
    require_access(args.pretrained_model_name_or_path)
    config = read_transformer_config(transformer_source, args.pretrained_model_name_or_path)

    def read():
        return [read_sources(args.real_dataset, "real", args)]

    [real] = read_on_all(read, accelerator, watchdog)
    record.trainable = count_parameters(WanTransformer3DModel, config)
    preflight(accelerator, args, manifests=[real], config=config, trainable=record.trainable, frozen=0)
    inputs = {"real dataset": real.fingerprint}
    if checkpoint is not None:
        require_resumable(checkpoint, accelerator, args, config, inputs)
    require_encoders(args.pretrained_model_name_or_path)
    check_transformer(transformer_source, args.pretrained_model_name_or_path)
    if checkpoint is not None:
        transformer_source = checkpoint / "model"

    # ---------------------------------------------------------------------------------------------------------- data
    while True:
        train_clips = few(real.train, args, accelerator)
        validation_clips = choose_validation_clips(real, args.num_validation_clips)
        other_prompt_clips = other_clips(validation_clips, [real.clips], "text")
        held_out_clips = [*validation_clips, *other_prompt_clips]
        if args.dry_run:
            record.plan_encoding(find_missing(chain(real.train, held_out_clips), args))
        encoded = encode_missing(chain(train_clips, held_out_clips), args, accelerator, watchdog)
        record.add_encoding(encoded)
        if not encoded.failures:
            break
        [real] = read_on_all(read, accelerator, watchdog)  # without them
        inputs["real dataset"] = real.fingerprint
        if checkpoint is not None:
            require_resumable(checkpoint, accelerator, args, config, inputs)
    train_dataset = ClipDataset(train_clips, args)
    validation_dataset, other_prompts = ClipDataset(validation_clips, args), ClipDataset(other_prompt_clips, args)
    sampler = MixedCGRealSampler(
        train_dataset,
        [],
        cg_ratio=0,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
        buckets=train_clips.bucket_numbers,
        real_sources=real.parts(train_clips),
    )
    tell_small_buckets(accelerator, sampler, train_clips.buckets)
    # Not prepared by Accelerate: the sampler has given this process its share already.
    train_loader = DataLoader(
        train_dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        worker_init_fn=shield_worker,
        collate_fn=train_dataset.collate,
        pin_memory=device.type == "cuda",
    )

    # -------------------------------------------------------------------------------------------- model and optimizer
    transformer = load_transformer(
        transformer_source, args.pretrained_model_name_or_path, torch.float32, empty=not reads_weights(accelerator)
    )
    transformer.requires_grad_(True).train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    in_full_precision(transformer.condition_embedder.time_embedder, device)
    under_autocast(transformer, device, args)
    optimizer = build_optimizer(transformer, args, device)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    model, optimizer = prepare(accelerator, transformer, optimizer)
    ema = build_ema(transformer, args.ema_decay)
    loop = LoopState(inputs=inputs)

    # -------------------------------------------------------------------------------------------------------- resume
    # The checkpoint decides over weights (read above), optimizer, schedule, sampler and step; the command line over
    # all the rest. Datasets and backbone must be the same.
    if checkpoint is not None:
        load_checkpoint(checkpoint, accelerator, optimizer, lr_scheduler, sampler, loop, ema)
        accelerator.print(f"resumed from {checkpoint} at step {loop.global_step}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting at step 0")
    start_logs(accelerator, args, loop)
    interruption = Interruption(args)

    # ---------------------------------------------------------------------------------------------------- validation
    def go_on():
        watchdog.beat(f"step {loop.global_step}: validation")
        return interruption.agree(accelerator)

    def validate():
        model.eval()

        def predictor(prompt_embeds):
            prompt_embeds = prompt_embeds.to(device)
            return lambda noisy, timesteps: model(noisy, timesteps, prompt_embeds, return_dict=False)[0]

        def predictors_of(batch):
            other = torch.stack([other_prompts[int(i)]["prompt_embeds"] for i in batch["index"]])
            return {"right": predictor(batch["prompt_embeds"]), "other_prompt": predictor(other)}

        with averaged_weights(ema, transformer, model):
            losses = clip_losses(
                validation_dataset,
                predictors_of,
                accelerator,
                args.flow_shift,
                args.train_batch_size,
                go_on=go_on,
            )
            model.train()
            if losses is None:
                return
            metrics = validation_metrics(losses, ["real"] * len(validation_clips), args.flow_shift)
            metrics["loss_at_start"] = loop.metrics.get("loss_at_start", metrics["loss"])
            loop.add_validation(metrics)
            accelerator.log({f"validation/{k}": v for k, v in metrics.items()}, loop.global_step)
            with failing_together(accelerator, args.output_dir):
                if accelerator.is_main_process:
                    show_history(loop.history, accelerator, args.output_dir)
                    tqdm.write(f"step {loop.global_step}: validation loss {metrics['loss']:.4f}")
            if loop.is_best():
                save("best")

    def save(name):
        folder = Path(args.output_dir) / name
        weights = gathered_state_dict(accelerator, transformer, optimizer)
        with failing_together(accelerator, folder):
            if accelerator.is_main_process:
                contract = build_contract(
                    args, loop, phase=1, base_model=args.pretrained_model_name_or_path, manifests=[real]
                )
                save_phase(folder, transformer, contract, weights)

    record.start()
    if loop.validation_due(args):
        with record.time("validation"):
            validate()

    # ------------------------------------------------------------------------------------------------------ training
    progress = tqdm(
        total=args.max_train_steps,
        initial=loop.global_step,
        desc="phase 1",
        disable=not accelerator.is_local_main_process,
    )
    micro_step = loop.global_step * args.gradient_accumulation_steps
    step_log, guard = StepLog(accelerator), StepGuard(accelerator, loop, args.max_skipped_steps)
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
                empty_prompt_embeds=train_dataset.empty_prompt_embeds,
                micro_step=micro_step,
                process_index=accelerator.process_index,
                num_processes=accelerator.num_processes,
                device=device,
            )
            watchdog.beat(f"step {loop.global_step + 1}: forward and backward")
            with accelerator.accumulate(model):
                velocity_pred = model(noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds, return_dict=False)[0]
                losses = noisy.weights * flow_matching.velocity_loss(velocity_pred, noisy.velocity_target)  # (B,)
                loss = losses.mean()
                accelerator.backward(loss)
                guard.add(losses, batch["name"])
                if accelerator.sync_gradients:
                    grad_norm = float(accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm))
                    # DeepSpeed has stepped or skipped in backward(), by the same norm.
                    if guard.may_step(grad_norm):
                        optimizer.step()
                        step_ema(ema, transformer)
                    optimizer.zero_grad()
            micro_step += 1
            step_log.add(losses, noisy.sigmas, batch["domain"])

        # One optimizer step is done: log, and at their steps validate and save.
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        loop.global_step += 1
        logs = step_log.finish(
            learning_rate=learning_rate,
            grad_norm=grad_norm,
            skipped_in_a_row=loop.skipped_in_a_row,
        )
        logs["train/loss_spike"] = guard.finish(logs["train/loss"])
        record.samples_per_second = logs["train/samples_per_second"]
        loop.logs = logs
        accelerator.log(logs, loop.global_step)
        progress.set_postfix(loss=f"{logs['train/loss']:.4f}", grad_norm=f"{logs['train/grad_norm']:.2f}")
        progress.update()
        interruption.agree(accelerator)
        if loop.validation_due(args) and interruption.stop is None:
            with record.time("validation"):
                validate()
        last = loop.global_step == args.max_train_steps
        if last or loop.global_step % args.checkpointing_steps == 0 or interruption.save:
            watchdog.beat(f"step {loop.global_step}: checkpoint")
            with record.time("checkpoint"):
                save_checkpoint(accelerator, transformer, optimizer, lr_scheduler, sampler, loop, ema, args)
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
    with averaged_weights(ema, transformer, model):
        save("final")
    accelerator.print(f"final/ and best/ ({loop.best_text}) are in {args.output_dir}")
    watchdog.close()


def main():
    args = parse_options(build_parser())
    if args.dry_run:
        dry_run(train, args)
    else:
        accelerator = build_accelerator(args)
        train(args, accelerator, RunRecord())
        accelerator.end_training()


if __name__ == "__main__":
    run(main)
