"""The models that the options of `c2r.generate` name: find them, check them by their headers, load them."""

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from c2r import InputError
from c2r.generation.control import check_controls
from c2r.generation.options import complete_options

if TYPE_CHECKING:
    import torch

    from c2r.models.contract import PhaseContract
    from c2r.models.lora_file import LoraFile
    from c2r.pipeline import C2RPipeline


def find_model(args: Namespace, device: str, with_control: bool) -> "tuple[PhaseContract, torch.dtype]":
    """Find the model, complete the options from its contract, and try --attention_backend. Changes `args` in place.

    Args:
        args: options.
        device: where the models are to run.
        with_control: True if a coarse video is given, which needs DINOv3.

    Returns:
        the model's contract, with the models that the options name; the dtype of the weights.

    Raises:
        InputError: there is no such model, or an option does not fit the model or this machine.
    """
    import torch

    from c2r.models.attention import try_attention_backend
    from c2r.models.backbone import read_transformer_config
    from c2r.models.contract import fetch_model, read_contract, with_moved_models

    if args.cpu_offload and device == "cpu":
        raise InputError("--cpu_offload: there is no GPU to offload from; leave it out")
    model = fetch_model(args.model)
    moved = {"base_model": args.pretrained_model_name_or_path, "backbone": args.backbone}
    moved |= {"dinov3": args.dinov3} if with_control else {}
    contract = with_moved_models(read_contract(model), args.model, **moved)
    args.model = str(model)
    complete_options(args, contract)
    dtype = weight_dtype(args.dtype, device)
    if args.attention_backend is not None:
        backbone = args.backbone if contract.has_backbone else args.model
        head_dim = read_transformer_config(backbone, contract.base_model)["attention_head_dim"]
        try_attention_backend(args.attention_backend, head_dim, torch.device(device), dtype, backward=False)
    return contract, dtype


def weight_dtype(name: str | None, device: str) -> "torch.dtype":
    """Return the dtype of the weights by the value of --dtype; None is bf16 on a GPU, else fp32."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[name or ("fp32" if device == "cpu" else "bf16")]


def check_files(args: Namespace, contract: "PhaseContract", loras: "Sequence[LoraFile]" = ()):
    """Check the files and models that the options name, reading headers only.

    Raises:
        InputError: one is missing or does not fit.
    """
    from c2r.models.assembly import check_model
    from c2r.models.dinov3 import check_dinov3
    from c2r.models.parts import ENCODERS, check_pipeline_parts

    if contract.phase == 1 and args.control_video:
        raise InputError(f"--model {args.model}: phase 1 has no control; leave --control_video out, or give phase 2")
    check_controls(args)
    check_model(args.model, contract, args.backbone, loras)
    if args.control_video:
        check_dinov3(args.dinov3, [(args.height, args.width)])
    # Last, because the text encoder is the largest download.
    check_pipeline_parts(args.pretrained_model_name_or_path, [*ENCODERS, "scheduler"])


def load_models(
    args: Namespace, device: str, dtype: "torch.dtype", loras: "Sequence[LoraFile]", **parts: Any
) -> "C2RPipeline":
    """Load the models that the options name, to a device.

    Args:
        args: options, completed from the contract.
        device: where the models run.
        dtype: dtype of the weights.
        loras: LoRAs to add to the backbone.
        parts: parts to replace, or None to leave one out, see `C2RPipeline.from_pretrained`.

    Raises:
        InputError: see `C2RPipeline.from_pretrained`.
    """
    from c2r.models.attention import use_lean_attention
    from c2r.pipeline import C2RPipeline, with_flow_shift

    pipeline = C2RPipeline.from_pretrained(
        args.model,
        torch_dtype=dtype,
        base=args.pretrained_model_name_or_path,
        backbone=args.backbone,
        loras=loras,
        **parts,
    )
    pipeline.scheduler = with_flow_shift(pipeline.scheduler, args.flow_shift)
    if args.attention_backend is not None:
        use_lean_attention(pipeline.transformer, args.attention_backend)
    if args.vae_tiling:
        pipeline.vae.enable_tiling()
    if args.cpu_offload:
        pipeline.enable_model_cpu_offload(device=device)
    else:
        pipeline.to(device)
    return pipeline
