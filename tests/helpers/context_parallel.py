"""Compare the gradients of split clips with those of whole ones, in a group of processes. Used by its test.

The argument is a file for the results of the first process: {case: [largest error of the prediction, of a gradient]},
relative to the largest number of each tensor.
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState

from c2r.flow_matching import velocity_loss
from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.models.attention import use_lean_attention
from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from c2r.models.context_parallel import ContextParallel
from c2r.models.offloading import store_blocks
from tests.helpers.tiny import LATENT_CHANNELS, tiny_c2r_transformer, tiny_inputs, tiny_transformer

#: 24 tokens and 4 heads, which 2 and 4 divide.
SIZES = {"num_attention_heads": 4, "attention_head_dim": 12}
CLIPS = {"batch_size": 2, "latent_frames": 2, "height": 64, "width": 48}


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


def run(model, inputs):
    """Return the prediction, the loss, and the gradients of a model's weights by name."""
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
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()


def compare(build, checkpointing, chunks, degree):
    """Return the largest errors of the prediction and of an averaged gradient, and that of a whole clip afterwards."""
    torch.manual_seed(0)
    model = build()
    use_lean_attention(model)
    chunk_feed_forward(model, chunks)
    set_checkpointing(model, checkpointing)
    inputs = tiny_inputs(**CLIPS)[: 3 if build is phase1 else 4]
    whole, expected = run(model, inputs)
    groups, group = dist.get_world_size() // degree, dist.get_rank() // degree
    context_parallel = ContextParallel(model, degree, torch.device("cpu"))
    sample, gradients = run(model, [tensor.chunk(groups)[group] for tensor in inputs])
    for gradient in gradients.values():  # as all engines do
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    with context_parallel.whole_clips():
        again, _ = run(model, inputs)
    return [
        error(sample, whole.chunk(groups)[group]),
        max(error(gradients[name], gradient) for name, gradient in expected.items()),
        error(again, whole),
    ]


def main():
    PartialState(cpu=True)
    errors = {
        f"{name}, degree {degree}": compare(*case, degree) for degree in (2, 4) for name, case in CASES.items()
    }
    if os.environ["RANK"] == "0":
        Path(sys.argv[1]).write_text(json.dumps(errors))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
