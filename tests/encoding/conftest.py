"""One process with its watchdog, as encoding passes take them."""

import pytest
from accelerate import Accelerator

from c2r.training.watchdog import Watchdog


@pytest.fixture(scope="session")
def process():
    """(accelerator, watchdog) of one process on the CPU."""
    accelerator = Accelerator(cpu=True)
    return accelerator, Watchdog(accelerator, timeout_seconds=600)
