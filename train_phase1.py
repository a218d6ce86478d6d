"""Phase 1: adapt the Wan 2.1 DiT to real urban video with a flow-matching loss.

    accelerate launch train_phase1.py --real_dataset data/real --output_dir outputs/phase1

VAE and UMT5 are frozen and only loaded to encode what the cache lacks; nothing of the control path is loaded.
best/ and final/ are folders that `WanTransformer3DModel.from_pretrained` loads.
"""

import argparse
from pathlib import Path

import torch
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from tqdm import tqdm

from c2r import flow_matching
from c2r.checkpoint import find_checkpoint, register_trainable_weights, save_checkpoint
from c2r.data.dataset import ClipDataset
from c2r.data.manifest import read_manifest
from c2r.encode import encode_missing
from c2r.models.assembly import check_transformer, load_transformer, save_phase
from c2r.options import HelpFormatter, add_common_options, parse_options, run
from c2r.sampler import MixedCGRealSampler
from c2r.training import (
    LoopState,
    StepLog,
    build_accelerator,
    build_contract,
    build_optimizer,
    in_full_precision,
    make_noisy_batch,
    start_logs,
)
from c2r.validation import choose_validation_clips, clip_losses


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


def main():
    # ------------------------------------------------------------------------------------------ options, accelerator
    args = parse_options(build_parser())
    accelerator = build_accelerator(args)
    set_seed(args.seed)
    device = accelerator.device
    resume_path = find_checkpoint(args.output_dir, args.resume_from_checkpoint)

    # ---------------------------------------------------------------------------------------------------------- data
    with accelerator.main_process_first():  # the others find in the cache what the first has looked into
        manifest = read_manifest(args.real_dataset, "real", args)
    if accelerator.is_main_process:
        manifest.report()
    inputs = {"real dataset": manifest.fingerprint}
    transformer_source = args.dit_path or args.pretrained_model_name_or_path
    check_transformer(transformer_source, args.pretrained_model_name_or_path)
    start_logs(accelerator, args)
    train_clips = manifest.train
    validation_clips = choose_validation_clips(manifest, args.num_validation_clips)
    encode_missing([*train_clips, *validation_clips], args, accelerator)
    train_dataset = ClipDataset(train_clips, args)
    validation_dataset = ClipDataset(validation_clips, args)
    sampler = MixedCGRealSampler(
        train_dataset,
        [],
        cg_ratio=0,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=accelerator.num_processes,
        process_index=accelerator.process_index,
    )
    # Not prepared by Accelerate: the sampler has given this process its share already.
    train_loader = DataLoader(
        train_dataset,
        batch_sampler=sampler,
        num_workers=args.dataloader_num_workers,
        collate_fn=train_dataset.collate,
        pin_memory=device.type == "cuda",
    )

    # -------------------------------------------------------------------------------------------- model and optimizer
    transformer = load_transformer(transformer_source, args.pretrained_model_name_or_path, torch_dtype=torch.float32)
    transformer.requires_grad_(True).train()
    if args.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    in_full_precision(transformer.condition_embedder.time_embedder, device)
    optimizer, lr_scheduler = build_optimizer(transformer.parameters(), args, device)
    register_trainable_weights(accelerator, transformer)
    model, optimizer = accelerator.prepare(transformer, optimizer)
    state = LoopState(inputs=inputs)
    accelerator.register_for_checkpointing(lr_scheduler, sampler, state)

    # -------------------------------------------------------------------------------------------------------- resume
    # The checkpoint decides over weights, optimizer (its learning rate too), schedule, sampler and step; the command
    # line over all the rest. Datasets and backbone must be the same.
    if resume_path is not None:
        accelerator.load_state(str(resume_path))
        state.require_inputs(inputs)
        # Accelerate restores its own count; of another accumulation it would be out of step.
        accelerator.step = state.global_step * args.gradient_accumulation_steps
        accelerator.print(f"resumed from {resume_path} at step {state.global_step}")
    elif args.resume_from_checkpoint:
        accelerator.print(f"no checkpoint in {args.output_dir} yet: starting at step 0")

    # ---------------------------------------------------------------------------------------------------- validation
    def validate():
        model.eval()

        def predictor_of(batch):
            prompt_embeds = batch["prompt_embeds"].to(device)
            return lambda noisy, timesteps: model(noisy, timesteps, prompt_embeds, return_dict=False)[0]

        losses = clip_losses(validation_dataset, predictor_of, accelerator, args.flow_shift, args.train_batch_size)
        model.train()
        loss = losses.mean().item()
        state.metrics = {"loss": loss, "loss_at_start": state.metrics.get("loss_at_start", loss)}
        accelerator.log({f"validation/{k}": v for k, v in state.metrics.items()}, state.global_step)
        if accelerator.is_main_process:
            tqdm.write(f"step {state.global_step}: validation loss {state.metrics['loss']:.4f}")
        if state.metrics["loss"] < state.best_validation_loss:
            state.best_validation_loss = state.metrics["loss"]
            save("best")

    def save(name):
        if accelerator.is_main_process:
            contract = build_contract(
                args, state, phase=1, base_model=args.pretrained_model_name_or_path, manifests=[manifest]
            )
            save_phase(Path(args.output_dir) / name, accelerator.unwrap_model(model), contract)
        accelerator.wait_for_everyone()

    if state.global_step == 0:
        validate()

    # ------------------------------------------------------------------------------------------------------ training
    progress = tqdm(
        total=args.max_train_steps,
        initial=state.global_step,
        desc="phase 1",
        disable=not accelerator.is_local_main_process,
    )
    micro_step = state.global_step * args.gradient_accumulation_steps
    step_log = StepLog(accelerator)
    batches = iter(train_loader)
    while state.global_step < args.max_train_steps:
        step_log.start()
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
        with accelerator.accumulate(model):
            velocity_pred = model(noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds, return_dict=False)[0]
            losses = noisy.weights * flow_matching.velocity_loss(velocity_pred, noisy.velocity_target)  # (B,)
            loss = losses.mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                grad_norm = accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        micro_step += 1
        step_log.add(losses, noisy.sigmas, batch["domain"])
        if not accelerator.sync_gradients:
            continue
        learning_rate = lr_scheduler.get_last_lr()[0]
        lr_scheduler.step()
        state.global_step += 1

        # One optimizer step is done: log, and at their steps validate and save.
        logs = step_log.finish(learning_rate=learning_rate, grad_norm=float(grad_norm))
        accelerator.log(logs, state.global_step)
        progress.set_postfix(loss=f"{logs['train/loss']:.4f}", grad_norm=f"{logs['train/grad_norm']:.2f}")
        progress.update()
        last = state.global_step == args.max_train_steps
        if state.global_step % args.validation_steps == 0 or last:
            validate()
        if state.global_step % args.checkpointing_steps == 0 or last:
            save_checkpoint(accelerator, args.output_dir, state.global_step, args.checkpoints_total_limit)
    progress.close()

    # ---------------------------------------------------------------------------------------------------- final save
    save("final")
    accelerator.print(f"final/ and best/ (validation loss {state.best_validation_loss:.4f}) are in {args.output_dir}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
