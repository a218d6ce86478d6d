"""The training loop of the stages: its schedule, interruptions and states."""

import pytest
import torch
from torch import nn

from c2r import InputError
from c2r.toy.pretraining.stage import fit


class Interrupted(Exception):
    pass


def trained(work_dir, steps=20, stop=None, learning_rate=0.1):
    """Fit a linear map to a known one, and raise before a step."""
    torch.manual_seed(0)
    module = nn.Linear(3, 2)

    def draw_loss(step):
        if step == stop:
            raise Interrupted
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return (module(x) - x[:, :2]).square().mean()

    fit("linear", module, draw_loss, steps, learning_rate, work_dir, log_every=5)
    return module.weight.detach()


def test_an_interrupted_stage_ends_with_the_same_weights(tmp_path):
    for name in ("whole", "parts"):
        (tmp_path / name).mkdir()
    whole = trained(tmp_path / "whole")
    with pytest.raises(Interrupted):
        trained(tmp_path / "parts", stop=13)
    assert torch.equal(trained(tmp_path / "parts"), whole)
    assert torch.equal(trained(tmp_path / "whole", stop=0), whole)  # no step is left
    assert (whole - torch.eye(2, 3)).abs().max() < 0.3  # it starts at up to 1.5


@pytest.mark.parametrize("changed", [{"steps": 40}, {"learning_rate": 0.2}])
def test_a_state_of_another_schedule_is_refused(changed, tmp_path):
    trained(tmp_path)
    with pytest.raises(InputError, match=r"linear\.pt: is of .*delete the file"):
        trained(tmp_path, **changed)


def test_a_gradient_that_is_not_finite_is_not_saved(tmp_path):
    module = nn.Linear(1, 1)
    with pytest.raises(RuntimeError, match="non-finite"):
        fit("linear", module, lambda step: module.weight.sum() * torch.inf, 10, 0.1, tmp_path, log_every=1)
    assert not list(tmp_path.iterdir())
