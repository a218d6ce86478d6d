"""The rules of the fake device against torch's own lists."""

import torch

from c2r.estimation.fake_device import CUDA_FULL, CUDA_FULL_RESULT, DEVICE, HALF, fake_device
from tests.helpers.simulated_device import autocast_lists


def names(operators):
    return {operator._schema.name.removeprefix("aten::") for operator in operators}


def test_autocast_casts_the_functions_that_cudas_casts():
    lists = autocast_lists()
    half, full = names(lists["LOWER_PRECISION_FP"]), names(lists["FP32"])
    assert names(lists["FP32_SET_OPT_DTYPE"]) <= CUDA_FULL_RESULT
    assert half >= HALF
    # The models call none of these.
    assert {name for name in half - HALF if not name.startswith(("_", "gru", "lstm", "rnn"))} <= {
        *("addmv", "addr", "chain_matmul", "convolution", "prelu"),
    }
    assert CUDA_FULL - {"hinge_embedding_loss"} <= full | {"hinge_embedding_loss"}
    assert {name for name in full - CUDA_FULL if "upsample" not in name} <= {"nll_loss2d"}


def test_autocast_is_as_before_afterwards():
    before = (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype)
    with fake_device("cuda"), torch.autocast("meta", torch.bfloat16):
        assert torch.is_autocast_enabled("meta")
        product = torch.empty(2, 2, device=DEVICE) @ torch.empty(2, 2, device=DEVICE)
        assert product.dtype == torch.bfloat16
        assert torch.softmax(product, -1).dtype == torch.float32
        with torch.autocast("meta", enabled=False):
            assert (torch.empty(2, 2, device=DEVICE) @ torch.empty(2, 2, device=DEVICE)).dtype == torch.float32
    assert (torch.autocast, torch.is_autocast_enabled, torch.get_autocast_dtype) == before
    assert not torch.is_autocast_enabled("cpu")
