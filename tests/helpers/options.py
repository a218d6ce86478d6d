"""Options as a training script gets them."""

from argparse import Namespace

from c2r import cli
from c2r.options import PHASE1, PHASE2

REQUIRED = ["--real_dataset", "data", "--output_dir", "out"]


def options(argv=()) -> Namespace:
    """Return phase 1's options of a small run; `argv` overrides them."""
    small = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 10,
        "learning_rate": 1e-3,
    }
    return cli.parse(PHASE1, [*REQUIRED, *(f"--{name}={value}" for name, value in small.items()), *argv])


def phase2_options(argv=()) -> Namespace:
    """Return phase 2's options with their defaults; `argv` overrides them."""
    return cli.parse(PHASE2, [*REQUIRED, "--resume_backbone_from=backbone", "--cg_dataset=cg", *argv])
