"""Compare the memory formula with simulated steps: real blocks on fake CUDA tensors and a model of the allocator."""

from argparse import Namespace

import pytest

from c2r.training.memory import GATHERED_BLOCKS, estimate_memory

WAN_1_3B = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
WAN_14B = {"num_attention_heads": 40, "attention_head_dim": 128, "ffn_dim": 13824, "num_layers": 40}
DIT_1_3B, CONTROL_1_3B = 1_418_996_800, 768_625_152
DIT_14B, CONTROL_14B = 14_288_491_584, 6_061_445_888
DINOV3 = 85_660_416


def gib(config, trainable, frozen=0, sharding=None, num_processes=1, **options):
    defaults = {"train_batch_size": 1, "gradient_accumulation_steps": 1, "gradient_checkpointing": True}
    defaults |= {"mixed_precision": "bf16", "optimizer": "adamw", "weight_storage": "fp32", "ema_decay": None}
    estimate = estimate_memory(
        Namespace(**defaults | options),
        config | {"patch_size": (1, 2, 2)},
        trainable=trainable,
        frozen=frozen,
        latent_grid=(21, 60, 104),
        sharding=sharding,
        num_processes=num_processes,
    )
    return estimate.total / 2**30


PHASE1, PHASE2 = (WAN_1_3B, DIT_1_3B), (WAN_1_3B, CONTROL_1_3B, DIT_1_3B + DINOV3)


@pytest.mark.parametrize(
    ("model", "options", "simulated"),
    [
        (PHASE1, {}, 25.7),
        (PHASE1, {"train_batch_size": 2}, 30.8),
        (PHASE1, {"train_batch_size": 4}, 45.6),
        (PHASE1, {"optimizer": "adamw8bit"}, 17.8),
        (PHASE1, {"weight_storage": "bf16"}, 25.5),
        (PHASE1, {"gradient_checkpointing": False}, 137.0),
        (PHASE2, {}, 19.3),
        (PHASE2, {"train_batch_size": 2}, 26.9),
        (PHASE2, {"train_batch_size": 4}, 42.4),
        (PHASE2, {"optimizer": "adamw8bit"}, 15.0),
        (PHASE2, {"weight_storage": "bf16"}, 20.2),
        (PHASE2, {"gradient_checkpointing": False}, 142.2),
        # Per rank, without the 2.7 GiB that the tables add for the context.
        ((WAN_14B, DIT_14B), {"sharding": "zero3", "num_processes": 8}, 54.0),
        ((WAN_14B, DIT_14B), {"sharding": "fsdp2", "num_processes": 16}, 40.7),
        ((WAN_14B, DIT_14B), {"sharding": "zero3_offload", "num_processes": 8}, 27.3),
        ((WAN_14B, CONTROL_14B, DIT_14B), {"sharding": "fsdp2", "num_processes": 8}, 44.3),
        ((WAN_14B, CONTROL_14B, DIT_14B), {"sharding": "zero3", "num_processes": 4}, 59.3),
    ],
)
def test_the_estimate_is_within_15_percent_of_simulated_steps(model, options, simulated):
    assert gib(*model, **options) == pytest.approx(simulated, rel=0.15)


def test_gradients_of_earlier_micro_steps_are_counted():
    # A single micro-step has its peak before its gradients exist.
    assert gib(*PHASE1, train_batch_size=4, gradient_accumulation_steps=8) == pytest.approx(
        gib(*PHASE1, train_batch_size=4) + 4 * DIT_1_3B / 2**30
    )


@pytest.mark.parametrize(
    ("options", "bytes_a_parameter"),
    [({"ema_decay": 0.999}, 4), ({"optimizer": "adamw8bit"}, -6), ({"weight_storage": "bf16"}, -4 + 2)],
)
def test_options_change_the_estimate_by_their_bytes(options, bytes_a_parameter):
    # bf16 storage: weights and gradients have two bytes less each, the low bits add two. This peak has no gradients.
    change = gib(*PHASE1, train_batch_size=4, **options) - gib(*PHASE1, train_batch_size=4)
    expected = bytes_a_parameter + (2 if "weight_storage" in options else 0)
    assert change == pytest.approx(expected * DIT_1_3B / 2**30, abs=1e-6)


def test_zero2_splits_states_and_gradients_but_not_weights():
    one, eight = (gib(WAN_14B, DIT_14B, sharding="zero2", num_processes=n) for n in (1, 8))
    # Split are the fp32 copy, both moments and the gradients.
    assert one - eight == pytest.approx((4 + 8 + 4) * DIT_14B * 7 / 8 / 2**30)
    assert GATHERED_BLOCKS >= 1
