"""Checks that several test modules make."""

import pytest
import torch

from c2r import InputError


def refusal(function, *args, **kwargs):
    """Return the message of the InputError that the call raises, which must be one line."""
    with pytest.raises(InputError) as error:
        function(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def equal_weights(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
