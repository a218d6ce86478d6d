"""The picture of the validations of a run."""

import io
import json

import torch
from PIL import Image

from c2r.evaluation.validation import validation_metrics
from c2r.evaluation.validation_plot import draw_history


def history_of(*gains):
    """Return the history of a phase 2 whose validations have these control gains."""
    history = []
    for step, gain in enumerate(gains):
        losses = {
            "right": 1.0,
            "other_control": 1.0 + gain,
            "no_control": 1.0,
            "other_prompt": 1.1,
            "coarse": 1.0 + gain / 2,
        }
        tables = {name: torch.full((1, 4), loss) for name, loss in losses.items()}
        history.append({"step": 100 * step} | validation_metrics(tables, ["real"], 3.0))
    return history


def test_the_same_history_gives_the_same_picture():
    history = history_of(0.0, 0.1, 0.3)
    picture = draw_history(history)
    # A resumed run reads its history from the JSON of a checkpoint.
    assert draw_history(json.loads(json.dumps(history))) == picture
    assert draw_history(history_of(0.0, 0.1, 0.2)) != picture
    with Image.open(io.BytesIO(picture)) as image:
        assert image.text == {}


def test_one_validation_of_phase_1_can_be_drawn():
    losses = {"right": torch.ones(1, 4), "other_prompt": torch.full((1, 4), 2.0)}
    assert draw_history([{"step": 0} | validation_metrics(losses, ["real"], 3.0)])
