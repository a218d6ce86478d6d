"""Training engines behind one set of functions: one process, DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2.

The launcher's configuration chooses the engine (see accelerate_configs/). Under all engines weights keep the dtype
that they were loaded in and the forward runs under our own autocast: no engine casts trainable weights to bf16.
"""

import logging
import os
import sys
from argparse import Namespace
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    get_cpu_distributed_information,
)
from torch.nn.parallel import DistributedDataParallel

from c2r import InputError
from c2r.files import write_problem
from c2r.models.offloading import stored_names
from c2r.training.compilation import require_compiler
from c2r.training.optimizer import adamw_8bit
from c2r.training.watchdog import joining

logger = logging.getLogger(__name__)


def collective_timeout(args: Namespace) -> timedelta:
    """Return the time after which torch gives a collective up.

    It is well above the watchdog's time-out, whose message names the process, even if that process was late already.
    """
    return timedelta(minutes=2 * args.distributed_timeout_minutes + 1)


def build_accelerator(args: Namespace) -> Accelerator:
    """Build the Accelerator of a run on the engine that the launcher has chosen, with logs in `output_dir`/logs.

    Args:
        args: options of a training script.

    Raises:
        InputError: `output_dir` cannot be created, DeepSpeed is missing, the launched processes do not join, or an
            option does not work on the engine.
    """
    output_dir = Path(args.output_dir)
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"--output_dir {output_dir}: cannot be created ({write_problem(error, output_dir)}); choose another folder"
        ) from error
    require_known_settings()
    _log_ignored_settings(args)
    deepspeed = _launched_with("DEEPSPEED")
    on_cpu = not torch.accelerator.is_available()
    group: dict[str, Any] = {"timeout": collective_timeout(args)}
    if on_cpu:  # Accelerate imports DeepSpeed wherever it is installed, which warns if it has to find this out
        os.environ["DS_ACCELERATOR"] = "cpu"
    if deepspeed and on_cpu:
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        group["backend"] = "gloo"
    with joining(60 * args.distributed_timeout_minutes):
        accelerator = Accelerator(
            # The options decide, not the launcher's configuration.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=args.gradient_accumulation_steps,
                # Otherwise FSDP2 would keep whole gradients between micro-steps: 57 GB on each device for 14B.
                sync_each_batch=_launched_with("FSDP"),
            ),
            mixed_precision="no",
            project_config=ProjectConfiguration(project_dir=str(output_dir), logging_dir=str(output_dir / "logs")),
            deepspeed_plugin=_deepspeed_plugin(args) if deepspeed else None,
            kwargs_handlers=[
                InitProcessGroupKwargs(**group),
                # Otherwise DDP keeps every gradient twice.
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),
            ],
            cpu=on_cpu and not deepspeed,
            # The schedulers here count optimizer steps; Accelerate would advance a prepared one once per process.
            step_scheduler_with_optimizer=False,
        )
        accelerator.wait_for_everyone()  # NCCL connects at the first collective
    if _launched_with("FSDP") and accelerator.distributed_type == DistributedType.MULTI_CPU:
        # Accelerate shards on accelerators only, but FSDP2 itself runs on gloo too.
        accelerator.state.distributed_type = PartialState().distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()
    require_joined(accelerator)
    require_supported(accelerator, args)
    return accelerator


#: Settings of the launcher that change how models are built or split, in ways that nothing here is tested with.
_UNKNOWN_SETTINGS = {
    "ACCELERATE_USE_MEGATRON_LM": "asks for Megatron-LM; give deepspeed_zero3.yaml or fsdp2.yaml",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "has a parallelism_config{}; remove it, fsdp2.yaml splits over all processes",
    "FSDP_ACTIVATION_CHECKPOINTING": "sets fsdp_activation_checkpointing; remove it: --gradient_checkpointing decides",
}


def require_known_settings():
    """Raise InputError for a setting of the launcher that cannot be followed, before a process group is made.

    The launcher passes its settings on as environment variables.
    """
    sizes = {
        size.lower(): os.environ.get(f"PARALLELISM_CONFIG_{size}", "1")
        for size in ("TP_SIZE", "CP_SIZE", "SP_SIZE", "DP_REPLICATE_SIZE", "DP_SHARD_SIZE")
    }
    above_one = ", ".join(f"{name} {size}" for name, size in sizes.items() if size != "1")
    for variable, problem in _UNKNOWN_SETTINGS.items():
        if os.environ.get(variable, "false").lower() == "true":
            raise InputError(f"the accelerate config {problem.format(above_one and f' with {above_one}')}")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend != "no":
        raise InputError(
            f"the accelerate config asks for torch.compile (dynamo_backend {backend}) of the whole model, which "
            "training is not tested with; remove its dynamo_config, and give --compile to compile the blocks"
        )
    # Accelerate's launcher of one process sets the latter two if it was asked for several, but passes on no number.
    several = {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if several and "WORLD_SIZE" not in os.environ and get_cpu_distributed_information().world_size == 1:
        raise InputError(
            "`accelerate launch` was asked for several processes, but has started 1, as it does on the CPU and with "
            f"distributed_type: 'NO'; start two on the CPU by `torchrun --nproc_per_node 2 {sys.argv[0]} …`, several "
            "GPUs with multi_gpu.yaml, or one by --num_processes 1 without MASTER_ADDR in the environment"
        )


def require_joined(accelerator: Accelerator):
    """Raise InputError if the launched processes have not joined into one group."""
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if accelerator.num_processes != launched:
        # Every process would train alone, and all would write into the same folder.
        raise InputError(
            f"{launched} processes were launched, but Accelerate joins {accelerator.num_processes}; "
            "check the configuration given to `accelerate launch`"
        )


def _launched_with(engine):
    return os.environ.get(f"ACCELERATE_USE_{engine}", "false").lower() == "true"


def _deepspeed_plugin(args):
    try:
        plugin = DeepSpeedPlugin(
            gradient_accumulation_steps=args.gradient_accumulation_steps,
            gradient_clipping=args.max_grad_norm,
            zero3_init_flag=False,  # `prepare` shards what has been loaded
        )
    except ImportError as error:
        raise InputError(
            "the accelerate config asks for DeepSpeed, which is not installed; pip install deepspeed==0.19.8"
        ) from error
    _override_deepspeed_config(plugin.deepspeed_config, args)
    if not torch.accelerator.is_available():
        from deepspeed import ops

        # On the CPU DeepSpeed would compile this at its first start, for a minute; it speeds up inference alone.
        ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return plugin


def _override_deepspeed_config(config, args):
    """Set the run's options in a DeepSpeed config, in place, and log the numbers that they replace."""
    for entry in ("optimizer", "scheduler"):
        if entry in config:
            raise InputError(
                f"the DeepSpeed config has its own {entry}; remove that entry: --optimizer, --learning_rate and "
                "--lr_scheduler decide"
            )
    for precision in ("fp16", "bf16"):
        if config.get(precision, {}).get("enabled") not in (None, False, "auto"):
            raise InputError(
                f"the DeepSpeed config enables {precision}; remove that entry and give --mixed_precision instead, "
                "which keeps trainable weights in fp32"
            )
        config.pop(precision, None)
    per_process = args.train_batch_size * args.gradient_accumulation_steps
    numbers = {
        "train_micro_batch_size_per_gpu": (args.train_batch_size, "--train_batch_size"),
        "gradient_accumulation_steps": (args.gradient_accumulation_steps, "--gradient_accumulation_steps"),
        "gradient_clipping": (args.max_grad_norm, "--max_grad_norm"),
        "train_batch_size": (per_process * int(os.environ.get("WORLD_SIZE", 1)), "--train_batch_size"),
    }
    for entry, (value, option) in numbers.items():
        if config.get(entry, "auto") not in ("auto", value):
            logger.warning("the DeepSpeed config's %s %s is replaced by %s: %s", entry, config[entry], option, value)
        config[entry] = value
    # torch's fused AdamW also steps on offloaded states, with the same result as on the GPU.
    config["zero_force_ds_cpu_optimizer"] = False


def _log_ignored_settings(args):
    """Log settings of the launcher that the options replace."""
    settings = {
        "ACCELERATE_MIXED_PRECISION": ("mixed_precision", args.mixed_precision, "no"),
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
            "gradient_accumulation_steps",
            str(args.gradient_accumulation_steps),
            "1",
        ),
    }
    for variable, (name, value, default) in settings.items():
        given = os.environ.get(variable, default)
        if given not in (default, value):
            logger.warning("the accelerate config's %s %s is ignored: --%s %s decides", name, given, name, value)


#: What the configurations of accelerate_configs/ for one machine split, see `sharding`.
SHARDING = {
    "single_gpu": None,
    "multi_gpu": None,
    "deepspeed_zero2": "zero2",
    "deepspeed_zero3": "zero3",
    "deepspeed_zero3_offload": "zero3",
    "fsdp2": "fsdp2",
}
ENGINE_NAMES = {None: "DDP", "zero2": "DeepSpeed ZeRO-2", "zero3": "DeepSpeed ZeRO-3", "fsdp2": "FSDP2"}


def sharding(accelerator: Accelerator) -> str | None:
    """Return the engine that splits weights or optimizer states: None, "zero2", "zero3" or "fsdp2".

    Raises:
        InputError: the launcher has chosen FSDP 1 or another ZeRO stage than 2 and 3, which are not tested.
    """
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise InputError("the accelerate config asks for FSDP 1; set fsdp_version: 2, as in fsdp2.yaml")
        return "fsdp2"
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        if stage not in (2, 3):
            raise InputError(
                f"the accelerate config asks for ZeRO stage {stage}; give deepspeed_zero2.yaml or deepspeed_zero3.yaml"
            )
        return f"zero{stage}"
    return None


def require_supported(accelerator: Accelerator, args: Namespace):
    """Raise InputError if an option does not work on the engine, with another option, or without a missing package."""
    if args.optimizer == "adamw8bit":
        adamw_8bit()
    check_options(args, sharding(accelerator), accelerator.num_processes)
    if args.compile:
        require_compiler(accelerator.device)


def check_options(args: Namespace, engine: str | None, num_processes: int):
    """Raise InputError if an option does not work on an engine, see `sharding`, or with another option."""
    degree = args.context_parallel_degree
    if num_processes % degree:
        raise InputError(
            f"--context_parallel_degree {degree}: {num_processes} process{'es' if num_processes > 1 else ''} cannot "
            f"form groups of {degree}; start a multiple of {degree}, or leave the option out"
        )
    if args.compile and degree > 1:
        raise InputError(f"--compile: is not tested with --context_parallel_degree {degree}; leave one of them out")
    if args.compile and engine in ("zero3", "fsdp2"):
        raise InputError(
            f"--compile: is not tested with {ENGINE_NAMES[engine]}, which gathers the weights of one block at a "
            "time; leave it out, or give multi_gpu.yaml or deepspeed_zero2.yaml"
        )
    if args.weight_storage == "bf16" and args.mixed_precision != "bf16":
        raise InputError(
            f"--weight_storage bf16: does not work with --mixed_precision {args.mixed_precision}; give "
            "--mixed_precision bf16, or --weight_storage fp32"
        )
    if args.weight_storage == "bf16" and args.ema_decay is not None:
        raise InputError(
            f"--ema_decay {args.ema_decay:g}: would average only the bf16 part of the weights, which small steps do "
            "not move; give --weight_storage fp32, or no average"
        )
    if args.weight_storage == "bf16" and engine is not None:
        # ZeRO steps on flat partitions and FSDP2 on DTensors of its own: the low bits beside them would be lost.
        raise InputError(
            f"--weight_storage bf16: needs whole weights on every device, but {ENGINE_NAMES[engine]} splits them; "
            "give --weight_storage fp32, or single_gpu.yaml or multi_gpu.yaml"
        )
    if args.step_in_backward and (engine is not None or num_processes > 1):
        raise InputError(
            "--step_in_backward: gradients of several processes are averaged or split first; leave it out, or give "
            "single_gpu.yaml"
        )
    for option in ("offload_backbone", "fp8_backbone"):
        if getattr(args, option, False) and engine is not None:  # phase 1 has no --fp8_backbone
            raise InputError(
                f"--{option}: {ENGINE_NAMES[engine]} moves or splits all weights by itself; leave it out, or give "
                "single_gpu.yaml or multi_gpu.yaml"
            )
    backbone = getattr(args, "resume_backbone_from", None) or ""
    if backbone.endswith(".gguf") and engine is not None:
        raise InputError(
            f"--resume_backbone_from {backbone}: {ENGINE_NAMES[engine]} cannot split the weights of a GGUF file; give "
            "single_gpu.yaml or multi_gpu.yaml, or the .safetensors file"
        )


def reads_weights(accelerator: Accelerator) -> bool:
    """Return True if this process reads the weights of the models that train.

    Every sharding engine distributes the weights of the main process. The other processes build the same model on
    memory that is never touched, so that a start at 14B does not need one copy per process.
    """
    return sharding(accelerator) is None or accelerator.is_main_process


def prepare(accelerator: Accelerator, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Any:
    """Return `accelerator.prepare(model, optimizer)`, after the preparations of DDP, ZeRO-3 and FSDP2."""
    if ignored := stored_names(model):
        # DDP would broadcast these weights, which may be on the CPU. They are frozen, and each process has read them.
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    if sharding(accelerator) == "zero3":
        import deepspeed

        # Without this the engine would put the whole model on every device before it splits it.
        deepspeed.zero.Init(module=model, config_dict_or_path=accelerator.state.deepspeed_plugin.deepspeed_config)
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(accelerator.device))
    if sharding(accelerator) == "fsdp2":
        # Accelerate finds parameters by this method of transformers' models; its fallback fails on a parameter of the
        # outermost module, which Wan has.
        model.get_parameter_or_buffer = lambda name: attrgetter(name)(model)  # type: ignore[assignment]
    return accelerator.prepare(model, optimizer)
