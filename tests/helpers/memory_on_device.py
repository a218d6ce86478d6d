"""Train one step in several memory modes on the simulated device, and print what each keeps there.

    python tests/helpers/on_simulated_device.py tests/helpers/memory_on_device.py

One line of JSON is printed: {mode: {"loss", "gradients" (a fingerprint), "kept" (bytes on the device between forward
and backward pass, without weights and inputs), "backbone" (bytes of the backbone's blocks on the device)}}.
"""

import gc
import json
import weakref

import torch

from c2r.files import fingerprint
from c2r.models.checkpointing import set_checkpointing
from c2r.models.chunking import chunk_feed_forward
from c2r.models.offloading import store_blocks
from tests.helpers.simulated_device import NAME, SimulatedTensor
from tests.helpers.tiny import tiny_c2r_transformer, tiny_inputs

DEVICE = torch.device(NAME, 0)

#: Arguments of `set_checkpointing`, of `store_blocks` and of `chunk_feed_forward`, by the mode's name.
MODES = {
    "none": (("none",), None, 1),
    "block": (("block",), None, 1),
    "offloaded inputs": (("block", True), None, 1),
    "offloaded backbone": (("block",), {"offload": True}, 1),
    "everything offloaded": (("block", True), {"offload": True}, 1),
    "chunks": (("block",), None, 3),
    "everything offloaded, chunks": (("block", True), {"offload": True}, 3),
    "float8, chunks": (("block",), {"float8": True}, 3),
    "offloaded float8, chunks": (("block",), {"offload": True, "float8": True}, 3),
}

created = []  #: weak references to the tensors inside those on the device


def record(tensor, inner):
    created.append(weakref.ref(inner))


def device_bytes():
    """Return the bytes of all tensors on the device, each memory counted once."""
    gc.collect()
    created[:] = [reference for reference in created if reference() is not None]
    storages = {
        inner.untyped_storage().data_ptr(): inner.untyped_storage().nbytes() for inner in (r() for r in created)
    }
    return sum(storages.values())


def step(checkpointing, stored, chunks):
    model = tiny_c2r_transformer(3, trained=True)
    if stored is not None:
        store_blocks(model.transformer.blocks, DEVICE, **stored)
    model.to(DEVICE).train()
    chunk_feed_forward(model, chunks)
    set_checkpointing(model, *checkpointing)
    inputs = [tensor.to(DEVICE) for tensor in tiny_inputs()]
    before = device_bytes()
    with torch.autocast(NAME, torch.bfloat16):
        loss = model(*inputs).sample.float().square().mean()
    kept = device_bytes() - before
    loss.backward()
    grads = {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}
    blocks = [*model.transformer.blocks.parameters()]
    return {
        "loss": loss.item(),
        "gradients": fingerprint(grads),
        "kept": kept,
        "backbone": sum(p.numel() * p.element_size() for p in blocks if p.device == DEVICE),
    }


def main():
    SimulatedTensor.__init__ = record
    print(json.dumps({mode: step(*arguments) for mode, arguments in MODES.items()}))


if __name__ == "__main__":
    main()
