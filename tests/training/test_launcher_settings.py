"""Settings of the launcher that the options replace are reported, those that cannot work are refused."""

import pytest
import yaml
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

from c2r import InputError
from c2r.training.engine import _override_deepspeed_config, build_accelerator, require_known_settings
from tests.helpers.commands import CONFIGS, TORCHRUN, start
from tests.helpers.forks import start_warm
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


@pytest.fixture
def launched(monkeypatch, tmp_path):
    """Return launched(config, *options), which sets the environment variables that `accelerate launch` would set."""
    for variable in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(variable, raising=False)

    def launched(config, *options):
        file = tmp_path / "config.yaml"
        file.write_text(yaml.safe_dump({"compute_environment": "LOCAL_MACHINE", "num_machines": 1} | config))
        args = launch_command_parser().parse_args([f"--config_file={file}", *options, "train_phase1.py"])
        args = _validate_launch_command(args)[0]
        alone = args.cpu or not (args.multi_gpu or args.use_fsdp or args.use_megatron_lm)
        environment = prepare_simple_launcher_cmd_env(args)[1] if alone else prepare_multi_gpu_env(args)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return launched


@pytest.mark.parametrize(
    ("config", "given"),
    [
        ({"distributed_type": "MULTI_CPU", "num_processes": 2, "use_cpu": True}, []),
        ({"distributed_type": "NO", "num_processes": 1, "use_cpu": True}, ["--cpu", "--num_processes=2"]),
        ({"distributed_type": "NO", "num_processes": 8, "use_cpu": False}, []),
    ],
)
def test_one_process_instead_of_several_is_refused(config, given, launched):
    launched(config, *given)
    with pytest.raises(InputError, match=r"asked for several processes, but has started 1.*torchrun --nproc_per_node"):
        require_known_settings()


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (
            {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}},
            "asks for Megatron-LM; give deepspeed_zero3.yaml or fsdp2.yaml",
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2},
                "parallelism_config": {"parallelism_config_tp_size": 2, "parallelism_config_dp_shard_size": 4},
            },
            "has a parallelism_config with tp_size 2, dp_shard_size 4; remove it",
        ),
        (
            {
                "distributed_type": "FSDP",
                "fsdp_config": {"fsdp_version": 2, "fsdp_activation_checkpointing": True},
            },
            "sets fsdp_activation_checkpointing; remove it: --gradient_checkpointing decides",
        ),
        (
            {"distributed_type": "MULTI_GPU", "dynamo_config": {"dynamo_backend": "inductor"}},
            r"asks for torch.compile (dynamo_backend inductor)",
        ),
    ],
)
def test_a_setting_that_cannot_be_followed_is_refused(config, line, launched):
    launched(config | {"num_processes": 8})
    with pytest.raises(InputError) as error:
        require_known_settings()
    assert str(error.value).startswith(f"the accelerate config {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["cpu", "single_gpu", "multi_gpu", "fsdp2", "fsdp2_multinode"])
def test_our_own_configs_are_followed(name, launched):
    launched(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()))
    require_known_settings()


@pytest.mark.slow
def test_torchrun_starts_two_processes_where_accelerate_launch_starts_one(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "from c2r import cli\n"
        "from c2r.training.engine import build_accelerator\n"
        "from tests.helpers.options import options\n"
        f"args = options(['--output_dir={tmp_path}'])\n"
        "cli.run(lambda: print(f'{build_accelerator(args).num_processes} joined', flush=True))\n"
    )
    assert start_warm(*TORCHRUN, script).stdout.count("2 joined") == 2
    done = start("-m", "accelerate.commands.launch", "--cpu", "--num_processes=2", script)
    assert "joined" not in done.stdout
    (line,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "but has started 1, as it does on the CPU and with distributed_type: 'NO'; start two" in line
    assert f"torchrun --nproc_per_node 2 {script}" in line
