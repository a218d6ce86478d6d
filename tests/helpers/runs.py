"""A phase 2 run on tiny models within the test process."""

from types import SimpleNamespace

import torch
from accelerate import Accelerator

from c2r.models.adversary import DomainClassifier
from c2r.models.controlnet import C2RControlNet
from c2r.models.transformer import C2RTransformer
from c2r.sampler import MixedCGRealSampler
from c2r.training.checkpoint import (
    load_checkpoint,
    load_domain_classifier,
    save_checkpoint,
)
from c2r.training.ema import build_ema, step_ema
from c2r.training.optimizer import build_lr_scheduler, build_optimizer
from c2r.training.run import LoopState
from tests.helpers.options import options
from tests.helpers.tiny import FEATURE_DIM, LATENT_CHANNELS, tiny_transformer


def build_run(out, *argv, checkpoint=None, adversarial_weight=0.0):
    """What the phase 2 script builds, on tiny models; `checkpoint` is of an earlier run."""
    args = options([f"--output_dir={out}", "--learning_rate=1e-2", *argv])
    args.adversarial_weight = adversarial_weight
    out.mkdir(exist_ok=True)
    accelerator = Accelerator(cpu=True)
    backbone = tiny_transformer()
    torch.manual_seed(1)
    controlnet = C2RControlNet.from_transformer(backbone, 2, 1, feature_dim=FEATURE_DIM)
    classifier = DomainClassifier(LATENT_CHANNELS, width=8) if adversarial_weight else None
    if checkpoint is not None:
        controlnet = C2RControlNet.from_pretrained(checkpoint / "model")
    if checkpoint is not None and adversarial_weight:
        load_domain_classifier(checkpoint, classifier)
    optimizer = build_optimizer(controlnet, args, accelerator.device, classifier)
    lr_scheduler = build_lr_scheduler(optimizer, args)
    model, optimizer = accelerator.prepare(C2RTransformer(backbone, controlnet, classifier), optimizer)
    return SimpleNamespace(
        args=args,
        accelerator=accelerator,
        model=model,
        controlnet=controlnet,
        classifier=classifier,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        sampler=MixedCGRealSampler(10, 3, cg_ratio=0.25),
        loop=LoopState(inputs={"backbone": "a"}),
        ema=build_ema(controlnet, args.ema_decay),
    )


def train_one_step(run):
    index = run.sampler.sample_batch(1)[0]
    generator = torch.Generator().manual_seed(index)
    with torch.autocast("cpu", torch.bfloat16, enabled=run.args.mixed_precision == "bf16"):
        velocity_pred = run.model(
            torch.randn(1, 4, 2, 4, 4, generator=generator),
            torch.tensor([500.0]),
            torch.randn(1, 8, 24, generator=generator),
            torch.randn(1, 5, 2, 2, FEATURE_DIM, generator=generator),
            **({"reversal_strength": torch.tensor([run.args.adversarial_weight])} if run.classifier else {}),
        )
    velocity_pred, *domain_logits = velocity_pred if run.classifier else (velocity_pred,)
    loss = velocity_pred.float().square().mean() + sum(logits.square().mean() for logits in domain_logits)
    run.accelerator.backward(loss)
    run.optimizer.step()
    step_ema(run.ema, run.controlnet)
    run.optimizer.zero_grad()
    run.lr_scheduler.step()
    run.loop.global_step += 1


def save(run):
    parts = (run.controlnet, run.optimizer, run.lr_scheduler, run.sampler, run.loop, run.ema, run.args)
    save_checkpoint(run.accelerator, *parts, run.classifier)
    return run.args.output_dir


def load(run, checkpoint):
    load_checkpoint(checkpoint, run.accelerator, run.optimizer, run.lr_scheduler, run.sampler, run.loop, run.ema)
