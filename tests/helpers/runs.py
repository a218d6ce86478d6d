"""A phase 2 run on tiny models within the test process."""

from argparse import Namespace
from types import SimpleNamespace

import torch
from accelerate import Accelerator

from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.options.shared import clip_settings
from c2r.sampler import MixedCGRealSampler
from c2r.training.checkpoint import load_checkpoint, load_domain_classifier, save_checkpoint
from c2r.training.ema import build_ema, step_ema
from c2r.training.optimizer import OptimizerSettings, build_lr_scheduler, build_optimizer
from c2r.training.progress import Progress
from c2r.training.run import Run, TrainState
from c2r.training.timings import Timings
from c2r.training.watchdog import Watchdog
from tests.helpers.options import options
from tests.helpers.tiny import FEATURE_DIM, LATENT_CHANNELS, tiny_transformer


def run_of(args: Namespace, accelerator: Accelerator | None = None, **fields) -> Run:
    """Return a run with these options, without a lock and without a checkpoint to resume from."""
    accelerator = accelerator or Accelerator(cpu=True)
    values = {
        "args": args,
        "planned": args,
        "accelerator": accelerator,
        "settings": clip_settings(args),
        "watchdog": Watchdog(accelerator, 60),
        "lock": None,
        "checkpoint": None,
        "progress": Progress(inputs={"backbone": "a"}),
        "timings": Timings(),
    }
    return Run(**values | fields)


def build_run(out, *argv, checkpoint=None, adversarial_weight=0.0):
    """Build what the phase 2 script builds: a `run`, its `state` and its `sampler`.

    Args:
        out: output folder.
        argv: options.
        checkpoint: of an earlier run, to load the weights from.
        adversarial_weight: above 0 with a domain classifier.
    """
    args = options([f"--output_dir={out}", "--learning_rate=1e-2", *argv])
    args.adversarial_weight = adversarial_weight
    out.mkdir(exist_ok=True)
    run = run_of(args, checkpoint=checkpoint)
    backbone = tiny_transformer()
    torch.manual_seed(1)
    controlnet = C2RControlNet.from_transformer(backbone, 2, 1, feature_dim=FEATURE_DIM)
    classifier = DomainClassifier(LATENT_CHANNELS, width=8) if adversarial_weight else None
    if checkpoint is not None:
        controlnet = C2RControlNet.from_pretrained(checkpoint / "model")
    if checkpoint is not None and adversarial_weight:
        load_domain_classifier(checkpoint, classifier)
    optimizer = build_optimizer(controlnet, OptimizerSettings.of(args), run.device, classifier)
    model = C2RTransformer(backbone, controlnet)
    model, prepared = run.accelerator.prepare(WithAdversary(model, classifier) if classifier else model, optimizer)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    state = TrainState(model, controlnet, prepared, lr_scheduler, build_ema(controlnet, args.ema_decay), classifier)
    return SimpleNamespace(run=run, state=state, sampler=MixedCGRealSampler(10, 3, cg_ratio=0.25))


def train_one_step(built):
    """Take one optimizer step on random inputs that follow from the sampler's next index."""
    run, state = built.run, built.state
    generator = torch.Generator().manual_seed(built.sampler.sample_batch(1)[0])
    with torch.autocast("cpu", torch.bfloat16, enabled=run.args.mixed_precision == "bf16"):
        prediction = state.model(
            torch.randn(1, 4, 2, 4, 4, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 8, 24, generator=generator),
            torch.randn(1, 5, 2, 2, FEATURE_DIM, generator=generator),
            **({"reversal_strength": torch.tensor([run.args.adversarial_weight])} if state.domain_classifier else {}),
        )
    loss = prediction.sample.float().square().mean()
    if state.domain_classifier:
        loss = loss + prediction.domain_logits.square().mean()
    run.accelerator.backward(loss)
    state.optimizer.step()
    step_ema(state.ema, state.trainable)
    state.optimizer.zero_grad()
    state.lr_scheduler.step()
    run.progress.global_step += 1


def save(built, step=None):
    """Save a checkpoint, of another step if one is given; return the output folder."""
    if step is not None:
        built.run.progress.global_step = step
    save_checkpoint(built.run, built.state, built.sampler)
    built.run.finish_saving()
    return built.run.args.output_dir


def load(built):
    """Load the checkpoint that the run was built with."""
    load_checkpoint(built.run, built.state, built.sampler)
