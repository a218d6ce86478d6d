"""Settings of the launcher that the options replace are reported, those that cannot work are refused."""

import pytest

from c2r import InputError
from c2r.training.engine import _override_deepspeed_config, build_accelerator
from tests.helpers.options import options


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("ACCELERATE_MIXED_PRECISION", "fp16", "mixed_precision fp16 is ignored: --mixed_precision bf16 decides"),
        (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            "7",
            "gradient_accumulation_steps 7 is ignored: --gradient_accumulation_steps 2 decides",
        ),
    ],
)
def test_an_ignored_setting_is_reported(variable, value, line, monkeypatch, tmp_path, capsys):
    args = options([f"--output_dir={tmp_path}"])
    build_accelerator(args)
    assert "is ignored" not in capsys.readouterr().out
    monkeypatch.setenv(variable, value)
    accelerator = build_accelerator(args)
    assert f"warning: the accelerate config's {line}" in capsys.readouterr().out
    assert accelerator.gradient_accumulation_steps == 2
    assert accelerator.mixed_precision == "no"  # autocast is ours


def test_numbers_of_a_deepspeed_config_are_replaced_and_reported(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "4")
    config = {"train_micro_batch_size_per_gpu": 3, "gradient_clipping": "auto", "gradient_accumulation_steps": 2}
    _override_deepspeed_config(config, options())
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "warning: the DeepSpeed config's train_micro_batch_size_per_gpu 3 is replaced by --train_batch_size: 2"
    ]
    assert config["train_batch_size"] == 2 * 2 * 4
    assert config["gradient_clipping"] == 1.0


@pytest.mark.parametrize("entry", ["optimizer", "scheduler"])
def test_a_deepspeed_config_with_its_own_optimizer_is_refused(entry):
    with pytest.raises(InputError, match=f"has its own {entry}; remove that entry"):
        _override_deepspeed_config({entry: {"type": "X"}}, options())
