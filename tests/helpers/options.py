"""Options as a training script gets them."""

import argparse

from c2r.options import add_common_options, parse_options

REQUIRED = ["--real_dataset", "data", "--output_dir", "out"]


def options(argv=(), **defaults):
    parser = argparse.ArgumentParser()
    phase = {
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_train_steps": 10,
        "learning_rate": 1e-3,
    }
    add_common_options(parser, **phase | defaults)
    return parse_options(parser, [*REQUIRED, *argv])
