"""Compare split clips with whole ones in a group of processes. Used by the test of context parallelism.

The argument is a file for the results of the first process: {case: {what: number}}. Errors are relative to the largest
number of a tensor.
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.utils._python_dispatch import TorchDispatchMode

from c2r.flow_matching import velocity_loss
from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.models.attention import use_lean_attention
from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from c2r.models.context_parallel import ContextParallel
from c2r.models.offloading import store_blocks
from tests.helpers.tiny import LATENT_CHANNELS, tiny_c2r_transformer, tiny_inputs, tiny_transformer

SIZES = {"num_attention_heads": 4, "attention_head_dim": 12}
BATCH, TOKENS, WIDTH = 2, 24, 48
CLIPS = {"batch_size": BATCH, "latent_frames": 2, "height": 64, "width": 48}


def phase1():
    return tiny_transformer(**SIZES).train()


def phase2():
    return tiny_c2r_transformer(trained=True, **SIZES).train()


def stored():
    model = phase2()
    store_blocks(model.transformer.blocks, torch.device("cpu"), offload=True)
    return model


def with_adversary():
    model = phase2()
    return WithAdversary(model, DomainClassifier(LATENT_CHANNELS)).train()


#: {case: (builds the model, checkpointing, parts of feed-forward layers)}
CASES = {
    "phase 1": (phase1, "none", 1),
    "phase 1, checkpointed": (phase1, "block", 1),
    "phase 2": (phase2, "none", 1),
    "phase 2, checkpointed": (phase2, "block", 2),
    "phase 2, attention kept": (phase2, "selective", 1),
    "phase 2, backbone offloaded": (stored, "block", 1),
    "phase 2, adversary": (with_adversary, "block", 1),
}


class SentBytes(TorchDispatchMode):
    """Counts the bytes that this process sends to others in all-to-alls."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operator, types, inputs=(), keywords=None):
        if operator is torch.ops._c10d_functional.all_to_all_single.default:
            (tensor, _, sizes, _) = inputs
            self.count += tensor.element_size() * sum(sizes[1:])  # the parts have equal sizes; one stays here
        return operator(*inputs, **keywords or {})


def run(model, inputs):
    """Return the prediction, and the gradients of a model's weights by name."""
    model.zero_grad()
    more = (1.0, torch.ones(len(inputs[0]))) if isinstance(model, WithAdversary) else ()
    output = model(*inputs, *more)
    loss = velocity_loss(output.sample, torch.ones_like(output.sample)).mean()
    if more:
        loss = loss + output.domain_logits.square().mean()
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return output.sample.detach(), gradients


def error(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()


def compare(build, checkpointing, chunks, degree):
    """Return the errors of a split clip's prediction and averaged gradients, and what was sent for them."""
    torch.manual_seed(0)
    model = build()
    use_lean_attention(model)
    chunk_feed_forward(model, chunks)
    set_checkpointing(model, checkpointing)
    inputs = tiny_inputs(**CLIPS)[: 3 if build is phase1 else 4]
    expected, expected_gradients = run(model, inputs)
    groups, group = dist.get_world_size() // degree, dist.get_rank() // degree
    context_parallel = ContextParallel(model, degree, torch.device("cpu"), timedelta(minutes=5))
    with SentBytes() as sent:
        sample, gradients = run(model, [tensor.chunk(groups)[group] for tensor in inputs])
    for gradient in gradients.values():  # as all engines do
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    with context_parallel.whole_clips():  # each process has the clips in another order
        again, _ = run(model, [tensor.roll(dist.get_rank(), 0) for tensor in inputs])
    return {
        "prediction": error(sample, expected.chunk(groups)[group]),
        "gradient": max(error(gradients[name], gradient) for name, gradient in expected_gradients.items()),
        "whole again": error(again, expected.roll(dist.get_rank(), 0)),
        "sent": sent.count,
    }


def main():
    PartialState(cpu=True)
    results = {f"{name}, degree {degree}": compare(*case, degree) for degree in (2, 4) for name, case in CASES.items()}
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
