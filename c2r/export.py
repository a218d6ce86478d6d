"""Write a trained model in a form that other programs read.

    python -m c2r.export --model outputs/phase1/best --format original --output street.safetensors --dtype fp16

Nothing is written into the model's own folder, and the output is complete or absent.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError, cli
from c2r.bars import slow_work
from c2r.options import EXPORT
from c2r.units import size_text

if TYPE_CHECKING:
    from c2r.models.contract import PhaseContract


def require_output(args: Namespace, suffix: str) -> Path:
    """Return the output's path.

    Args:
        args: options of this command.
        suffix: ending that a file of the format has; "" for a folder.

    Raises:
        InputError: it has another ending, would overwrite the model, or is a folder with content.
    """
    path, model = Path(args.output), Path(args.model).resolve()
    where = f"--output {args.output}"
    if suffix and path.suffix != suffix:
        raise InputError(f"{where}: --format {args.format} writes a {suffix} file; give a name that ends in {suffix}")
    if path.resolve() == model or model in path.resolve().parents or path.resolve() in model.parents:
        raise InputError(f"{where}: lies in the folder of --model {args.model} or around it; choose another place")
    if suffix and path.is_dir():
        raise InputError(f"{where}: is a folder; choose another name")
    if not suffix and path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{where}: exists already; give a new folder")
    return path


def require_phase1(args: Namespace, contract: "PhaseContract"):
    """Raise InputError for a model of phase 2, of which the control branch has no such format."""
    if contract.phase != 1:
        raise InputError(
            f"--model {args.model}: a ControlNet of phase 2, which --format {args.format} has no place for; give its "
            f"backbone, {contract.backbone}"
        )


def export_original(args: Namespace, contract: "PhaseContract") -> str:
    """Write phase 1's weights as one file in Wan's original layout; return a line on how to use it."""
    from c2r.models.backbone import fingerprint_transformer, index_weights
    from c2r.models.original_layout import save_original

    require_phase1(args, contract)
    path = require_output(args, ".safetensors")
    index, _ = index_weights(args.model)
    if contract.lora_rank is not None:
        with slow_work("reading the backbone's weights for their fingerprint", shown=True):
            fingerprint_transformer(args.model)  # refuses a LoRA on another backbone than that of its training
    num_bytes = save_original(index, path, _dtype(args))
    return f"{size_text(num_bytes)}; in ComfyUI put it into models/diffusion_models"


def export_lora(args: Namespace, contract: "PhaseContract") -> str:
    """Write the LoRA of a phase 1 as one file; return a line on how to use it."""
    from c2r.models.lora import LoraWeights, save_lora

    if contract.lora_rank is None:
        raise InputError(f"--model {args.model}: has no LoRA; give best/ or final/ of a train_phase1.py --lora_rank")
    path = require_output(args, ".safetensors")
    save_lora(path, LoraWeights.load(args.model), comfyui=args.format == "lora-comfyui", dtype=_dtype(args))
    if args.format == "lora":
        return "load_lora_weights of Diffusers' pipelines and c2r.generate --lora load it"
    return "in ComfyUI put it into models/loras"


def export_pipeline(args: Namespace, contract: "PhaseContract") -> str:
    """Write the model with all that its contract names as one folder; return a line on how to use it."""
    from torch import nn

    from c2r.files import require_room
    from c2r.pipeline import C2RPipeline

    path = require_output(args, "")
    if (contract.backbone or "").endswith(".gguf"):
        raise InputError(
            f"--model {args.model}: its backbone {contract.backbone} is quantised, which Diffusers cannot save; keep "
            "this file, and share it with the folder of phase 2"
        )
    pipeline = C2RPipeline.from_pretrained(args.model, torch_dtype=_dtype(args))
    models = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    require_room(path, num_bytes)
    pipeline.save_pretrained(path)
    return f"{size_text(num_bytes)}; C2RPipeline.from_pretrained and c2r.generate --model load it"


def _dtype(args):
    import torch

    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, None: None}[args.dtype]


#: Function of each format, by the choices of --format.
FORMATS: dict[str, Callable[[Namespace, "PhaseContract"], str]] = {
    "original": export_original,
    "lora": export_lora,
    "lora-comfyui": export_lora,
    "pipeline": export_pipeline,
}


def main(argv: list[str] | None = None):
    """Run the command with these arguments."""
    args = cli.parse(EXPORT, argv)

    from c2r.models.contract import read_contract

    remark = FORMATS[args.format](args, read_contract(args.model))
    print(f"wrote {args.output}: {remark}", flush=True)


if __name__ == "__main__":
    cli.run(main)
