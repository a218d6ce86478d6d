import torch
from diffusers.optimization import get_scheduler


def build_optimizer(module, args, device):
    return torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=args.learning_rate,
        betas=(args.adam_beta1, args.adam_beta2),
        weight_decay=args.adam_weight_decay,
        eps=args.adam_epsilon,
        fused=True,
    )


def build_lr_scheduler(optimizer, args):
    return get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps,
        num_training_steps=args.max_train_steps,
    )


def exact_state_dict(module, optimizer):
    return module.state_dict()
