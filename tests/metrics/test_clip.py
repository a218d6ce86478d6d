"""Shapes and dtypes of a clip's videos."""

import pytest
import torch

from c2r.metrics.clip import EvaluatedClip


@pytest.mark.parametrize(
    "wrong",
    [
        {"video": torch.zeros(2, 8, 8, 3)},
        {"video": torch.zeros(0, 3, 8, 8)},
        {"truth": torch.zeros(3, 3, 8, 8)},
        {"control": torch.zeros(2, 3, 8, 8, dtype=torch.uint8)},
        {"ids": torch.zeros(2, 8, 8)},
        {"depth": torch.zeros(2, 1, 8, 8)},
    ],
)
def test_a_wrong_shape_or_dtype_is_refused(wrong):
    with pytest.raises(ValueError, match=r"a\.mp4: \w+ is \("):
        EvaluatedClip(**{"name": "a.mp4", "prompt": "", "video": torch.zeros(2, 3, 8, 8)} | wrong)
