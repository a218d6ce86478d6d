"""Optimizer steps within the backward pass: each gradient is used and freed as soon as it is complete."""

import torch


class StepInBackward:
    """Steps an optimizer on one parameter after another, while the backward pass runs.

    A parameter's gradient is complete when all of its uses have been differentiated, so nothing that still runs reads
    its old value. A gradient that is not finite is dropped without a step. A loss that is not finite makes all
    gradients so, and then no parameter is changed, as without this class.

    Args:
        optimizer: its parameters must get their gradients from one backward pass, and not be clipped.
    """

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer = optimizer
        self._norms: list[torch.Tensor] = []
        self._group_numbers: dict[torch.Tensor, int] = {}
        for number, group in enumerate(optimizer.param_groups):
            for parameter in group["params"]:
                self._group_numbers[parameter] = number
                parameter.register_post_accumulate_grad_hook(self._step)

    def _step(self, parameter):
        norm = torch.linalg.vector_norm(parameter.grad, dtype=torch.float32)
        self._norms.append(norm)
        if norm.isfinite():
            groups = self.optimizer.param_groups  # looked up now: a resumed run replaces them
            self.optimizer.param_groups = [groups[self._group_numbers[parameter]] | {"params": [parameter]}]
            try:
                self.optimizer.step()
            finally:
                self.optimizer.param_groups = groups
        parameter.grad = None

    def take_grad_norm(self) -> float:
        """Return the norm of all gradients since the last call."""
        norms, self._norms = self._norms, []
        return float(torch.linalg.vector_norm(torch.stack(norms)))
