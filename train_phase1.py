"""Phase 1: adapt the Wan 2.1 DiT to real urban video with a flow-matching loss.

    accelerate launch train_phase1.py --real_dataset data/real --output_dir outputs/phase1

VAE and UMT5 are frozen and loaded only to encode clips that are not cached. Nothing of the control path is loaded.
`WanTransformer3DModel.from_pretrained` loads best/ and final/. With --lora_rank the backbone is frozen and a LoRA
trains, which `load_lora_weights` of Diffusers' pipelines loads.
"""

from c2r import cli
from c2r.options import PHASE1

if __name__ == "__main__":
    cli.check_command_line(PHASE1)  # before the imports below, which take seconds

from dataclasses import dataclass

import torch
from accelerate.utils import set_seed
from diffusers import ModelMixin, WanTransformer3DModel

from c2r import flow_matching
from c2r.data.clips import Clip, Clips
from c2r.encoding.dataset import ClipDataset
from c2r.evaluation.conditions import PromptConditions, choose_validation_clips
from c2r.evaluation.evaluate_run import evaluating, record_validation
from c2r.models.backbone import load_transformer
from c2r.models.lora import LoraWeights
from c2r.models.offloading import store_blocks
from c2r.sampler import MixedCGRealSampler
from c2r.training.batches import TrainBatches
from c2r.training.checkpoint import save_checkpoint
from c2r.training.dry_run import launch, limit_to_dry_run
from c2r.training.ema import step_ema
from c2r.training.engine import reads_weights
from c2r.training.guard import StepGuard
from c2r.training.logs import StepLog
from c2r.training.plan import Plan, check_phase1, encode_until_usable
from c2r.training.results import save_model
from c2r.training.run import Run, TrainState
from c2r.training.setup import build_train_state, resume
from c2r.training.step import NoiseSettings, clip_gradients, finish_step, make_noisy_batch


@dataclass
class ChosenClips:
    """The clips that this run uses."""

    real: Clips  #: training clips
    conditions: PromptConditions  #: the validation clips with their own prompts and wrong ones

    @property
    def train(self) -> list[Clips]:
        """Clips to train on, by domain."""
        return [self.real]

    @property
    def held_out(self) -> list[Clip]:
        """Clips that validation needs."""
        return self.conditions.to_encode


def choose_clips(run: Run, plan: Plan) -> ChosenClips:
    """Choose the clips to train on and to validate on."""
    validation_clips = choose_validation_clips(plan.real, run.args.num_validation_clips)
    conditions = PromptConditions(
        validation_clips,
        [plan.real.clips],
        run.settings,
        flow_shift=run.args.flow_shift,
        batch_size=run.args.train_batch_size,
    )
    return ChosenClips(limit_to_dry_run(plan.real.train, run), conditions)


def train(run: Run) -> Plan:
    """Train from the first check to final/. Return the run's plan, which --dry_run needs."""
    args, accelerator, progress = run.args, run.accelerator, run.progress

    # ------------------------------------------------------------------------------------------------ 1. refuse early
    plan = check_phase1(run)  # access, dataset, batches, memory, disk, checkpoint; no weight is read

    # -------------------------------------------------------------------------------------------------------- 2. data
    clips = encode_until_usable(run, plan, choose_clips)
    dataset = ClipDataset(clips.real, run.settings)
    sampler = MixedCGRealSampler(
        dataset,
        [],
        cg_ratio=0,
        batch_size=args.train_batch_size,
        seed=args.seed,
        num_processes=run.num_groups,
        process_index=run.group_index,
        buckets=clips.real.bucket_numbers,
        real_parts=plan.real.parts(clips.real),
    )
    batches = TrainBatches(run, dataset, sampler)

    # ------------------------------------------------------------------------------------------------------- 3. model
    transformer, trainable = load_models(run, plan)
    state = build_train_state(run, transformer, backbone=transformer, trainable=trainable)
    progress.inputs = plan.inputs

    # ------------------------------------------------------------------------------------------------------ 4. resume
    # The checkpoint decides over weights (read above), moments, sampler and step; the command line over everything
    # else, the learning rate and its schedule included (`Option.on_resume`). check_phase1 has refused another dataset,
    # or option that must not change.
    resume(run, state, sampler)
    run.start_training()

    # -------------------------------------------------------------------------------------------------- 5. evaluation
    if run.validation_is_due():
        validate(run, state, clips.conditions, plan)

    # ---------------------------------------------------------------------------------------------------- 6. the loop
    noise = NoiseSettings.of(run)
    copies = args.context_parallel_degree  # processes that train on the same clips
    log = StepLog(accelerator, copies=copies)
    guard = StepGuard(accelerator, progress, args.max_skipped_steps, copies)
    for _ in run.steps("phase 1"):
        log.start()
        for draw, batch in batches.of_one_step():
            noisy = make_noisy_batch(batch, noise, draw, dataset.empty_prompt_embeds, run.device)
            with accelerator.accumulate(state.model):
                velocity_pred = state.model(noisy.noisy_latents, noisy.timesteps, noisy.prompt_embeds).sample
                losses = noisy.weights * flow_matching.velocity_loss(velocity_pred, noisy.velocity_target)  # (B,)
                accelerator.backward(losses.mean())
                guard.add(losses, batch["name"])
                if accelerator.sync_gradients:
                    grad_norm = clip_gradients(accelerator, state, args.max_grad_norm)
                    # DeepSpeed has stepped or skipped in backward() already, by the same norm.
                    if guard.may_step(grad_norm):
                        state.optimizer.step()
                        step_ema(state.ema, trainable)
                    state.optimizer.zero_grad()
            log.add(losses, noisy.sigmas, batch["domain"])
        finish_step(run, state, log, guard, grad_norm)
        if run.validation_is_due():
            validate(run, state, clips.conditions, plan)
        if run.checkpoint_is_due():
            save_checkpoint(run, state, sampler)
    run.end_training()

    # -------------------------------------------------------------------------------------------------- 7. final save
    with evaluating(run, state, "final"):
        save(run, state, plan, "final")
    run.close()
    return plan


def validate(run: Run, state: TrainState, conditions: PromptConditions, plan: Plan):
    """Measure the loss on held-out clips with right and wrong prompts; save best/ if it is the best so far."""
    with evaluating(run, state, "validation"):
        losses = conditions.losses(state.model, run.accelerator, lambda: run.go_on("validation"))
        if record_validation(run, losses, conditions) and run.progress.record_best():
            save(run, state, plan, "best")


def load_models(run: Run, plan: Plan) -> tuple[WanTransformer3DModel, ModelMixin]:
    """Load the backbone, which is called, and the part of it that trains: itself, or a LoRA on it."""
    args, base_model, empty = run.args, run.args.pretrained_model_name_or_path, not reads_weights(run.accelerator)
    if args.lora_rank is None:
        # fp32 under our own autocast: bf16 weights would lose small updates.
        transformer = load_transformer(plan.backbone, base_model, torch.float32, empty=empty).requires_grad_(True)
        return transformer, transformer
    transformer = load_transformer(plan.backbone, base_model, run.weight_dtype, empty=empty)
    set_seed(args.seed)  # again: encoding has drawn random numbers, depending on what was cached
    lora = LoraWeights.load(run.checkpoint / "model") if run.checkpoint else LoraWeights.from_config(plan.config)
    lora.attach(transformer)
    if args.offload_backbone:
        store_blocks(transformer.blocks, run.device, offload=True)
    return transformer, lora


def save(run: Run, state: TrainState, plan: Plan, name: str):
    """Save the backbone, or the LoRA with what it is for, as best/ or final/."""
    lora = {}
    if run.args.lora_rank is not None:
        lora = {"lora_rank": run.args.lora_rank, "backbone": plan.backbone, "backbone_sha256": plan.inputs["backbone"]}
    save_model(run, state, name, phase=1, mixtures=plan.mixtures, **lora)


def main():
    launch(train, cli.parse(PHASE1))


if __name__ == "__main__":
    cli.run(main)
