"""Set up a run: lock its folder, find its checkpoint, prepare model and optimizer, and resume."""

import logging
from argparse import Namespace

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import ModelMixin, WanTransformer3DModel

from c2r.models.adversary import DomainClassifier
from c2r.models.attention import use_lean_attention
from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from c2r.models.context_parallel import ContextParallel
from c2r.options.shared import clip_settings
from c2r.sampler import MixedCGRealSampler
from c2r.training.backward_step import StepInBackward
from c2r.training.checkpoint import load_checkpoint
from c2r.training.compilation import compile_blocks
from c2r.training.ema import build_ema
from c2r.training.engine import collective_timeout, prepare
from c2r.training.optimizer import OptimizerSettings, build_lr_scheduler, build_optimizer
from c2r.training.precision import disable_autocast, enable_autocast
from c2r.training.progress import Progress
from c2r.training.resume import agree_on_checkpoint, changed_engine, changed_options, lock_output_dir
from c2r.training.run import Run, TrainState
from c2r.training.timings import Timings
from c2r.training.watchdog import Watchdog

logger = logging.getLogger(__name__)


def start_run(args: Namespace, accelerator: Accelerator, planned: Namespace | None = None) -> Run:
    """Lock the output folder and find the checkpoint to resume from. Call it on every process.

    Args:
        args: options of the script.
        accelerator: from `build_accelerator`.
        planned: in a dry run, the options of the run that it rehearses.

    Raises:
        InputError: another run writes into the folder, or the checkpoint is missing or damaged.
    """
    watchdog = Watchdog(accelerator, 60 * args.distributed_timeout_minutes)
    set_seed(args.seed)
    return Run(
        args=args,
        planned=planned or args,
        accelerator=accelerator,
        settings=clip_settings(args),
        watchdog=watchdog,
        lock=lock_output_dir(accelerator, args.output_dir),
        checkpoint=agree_on_checkpoint(accelerator, args.output_dir, args.resume_from_checkpoint),
        progress=Progress(),
        timings=Timings(),
    )


def build_train_state(
    run: Run,
    model: torch.nn.Module,
    backbone: WanTransformer3DModel,
    trainable: ModelMixin,
    domain_classifier: DomainClassifier | None = None,
) -> TrainState:
    """Set the precision, build optimizer, schedule and average, and prepare the model for the training engine.

    Args:
        run: the script's run.
        model: one module with all trainable parts, because an engine such as DeepSpeed wraps one module.
        backbone, trainable, domain_classifier: parts of `model`.
    """
    args = run.args
    set_forward(args, model, backbone, run.device)
    if args.compile:
        compile_blocks(model)
    degree = args.context_parallel_degree
    context_parallel = ContextParallel(model, degree, run.device, collective_timeout(args)) if degree > 1 else None
    optimizer = build_optimizer(trainable, OptimizerSettings.of(args), run.device, domain_classifier)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    model, optimizer = prepare(run.accelerator, model, optimizer)
    ema = build_ema(trainable, args.ema_decay)
    # After `prepare`, which may move the parameters and would lose their hooks.
    in_backward = StepInBackward(lr_scheduler.optimizer) if args.step_in_backward else None
    return TrainState(model, trainable, optimizer, lr_scheduler, ema, domain_classifier, in_backward, context_parallel)


def set_forward(args: Namespace, model: torch.nn.Module, backbone: WanTransformer3DModel, device: torch.device):
    """Set how a model's forward runs in training: its mode, attention, memory modes and precision.

    Args:
        args: options of a training script.
        model: the module that trains.
        backbone: the part of it whose time embedding stays outside autocast.
        device: the run's; on the meta device attention is torch's own.
    """
    model.train()
    use_lean_attention(model, None if device.type == "meta" else args.attention_backend)
    chunk_feed_forward(model, args.ffn_chunks)
    set_checkpointing(model, args.gradient_checkpointing, args.offload_activations)
    disable_autocast(backbone.condition_embedder.time_embedder, device)
    enable_autocast(model, device, args.mixed_precision)


def resume(run: Run, state: TrainState, sampler: MixedCGRealSampler):
    """Load everything but the weights from the checkpoint, if there is one. Call it on every process."""
    if run.checkpoint is not None:
        load_checkpoint(run, state, sampler)
        logger.info("resumed from %s at step %d", run.checkpoint, run.progress.global_step)
        if (line := changed_engine(run.checkpoint, run.accelerator)) is not None:
            logger.info("resumed on %s", line)
        for line in [] if run.args.dry_run else changed_options(run.checkpoint, run.args):
            logger.info("resumed with %s", line)
    elif run.args.resume_from_checkpoint:
        logger.info("no checkpoint in %s yet: starting at step 0", run.args.output_dir)
