import argparse
import errno

import pytest
from tqdm import tqdm

from c2r import InputError
from c2r.cli import run
from c2r.options import add_common_options, parse_options
from tests.helpers.options import options


def test_command_line_wins_over_config_over_defaults(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("learning_rate: 1e-5\nheight: 64\nreal_dataset: other\ngradient_checkpointing: false\n")
    args = options(["--config", str(config), "--height", "32"])
    assert args.learning_rate == 1e-5  # YAML reads 1e-5 as a string
    assert args.height == 32
    assert args.width == 832
    assert args.gradient_checkpointing is False
    assert args.real_dataset == ["data"]


def test_config_can_give_required_options(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("real_dataset: a\noutput_dir: b\n")
    parser = argparse.ArgumentParser()
    add_common_options(
        parser, **dict.fromkeys(("train_batch_size", "gradient_accumulation_steps", "max_train_steps"), 1)
    )
    parser.set_defaults(learning_rate=1.0)
    args = parse_options(parser, ["--config", str(config)])
    assert (args.real_dataset, args.output_dir) == (["a"], "b")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("hieght: 64", "'hieght'"),
        ("height: tall", "height"),
        ("gradient_checkpointing: 3", "gradient_checkpointing"),
        ("lr_scheduler: cosin", "lr_scheduler"),
        ("- a list", "option: value"),
        ("checkpointing_steps: 2.5", "checkpointing_steps"),
        ("height: null", "height"),
        ("a: [", "cannot be read"),
    ],
)
def test_bad_config_is_one_line(tmp_path, text, part):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(InputError, match=part) as error:
        options(["--config", str(config)])
    assert "\n" not in str(error.value)
    assert str(config) in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("height", 100),
        ("width", 0),
        ("num_frames", 16),
        ("train_batch_size", 0),
        ("max_train_steps", -1),
        ("fps", 0),
        ("flow_shift", "nan"),
        ("prompt_dropout", 1.5),
        ("learning_rate", -1),
        ("checkpoints_total_limit", 0),
        ("save_every_minutes", 0),
        ("save_before_timeout", "soon"),
        ("ema_decay", 1),
        ("max_skipped_steps", -1),
        ("distributed_timeout_minutes", 0),
    ],
)
def test_bad_values_name_their_option(name, value):
    with pytest.raises(InputError, match=f"--{name} {value}"):
        options([f"--{name}={value}"])


@pytest.mark.parametrize("error", [InputError("a.mp4: unreadable"), OSError(errno.ENOSPC, "No space left", "a.mp4")])
def test_an_errors_line_stands_alone(error, capsys, signal_handlers):
    def main():
        bar = tqdm(total=2)
        bar.update()
        raise error

    with pytest.raises(SystemExit, match=r"^error: a\.mp4: "):
        run(main)
    assert capsys.readouterr().err.endswith("\n")  # the bar is closed, though the error still holds its frame
