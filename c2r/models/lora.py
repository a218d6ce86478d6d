"""A LoRA that trains over a frozen backbone; `c2r.models.lora_file` adds it to the backbone's weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.lora_base import LORA_ADAPTER_METADATA_KEY
from safetensors.torch import save
from torch import nn
from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import complete_folder, write_atomic
from c2r.models.hub import Count, Layers, Width, read_config, require_complete
from c2r.models.lora_file import WEIGHTS, LoraFile
from c2r.models.original_layout import original_names

#: Linear layers of a block that get a LoRA: all of attention and feed-forward.
TARGETS = (
    *(f"{attention}.{layer}" for attention in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")),
    "ffn.net.0.proj",
    "ffn.net.2",
)


class LoraConfig(TypedDict):
    """The checked entries of a LoRA's config.json."""

    rank: Width
    num_layers: Layers
    num_attention_heads: Count
    attention_head_dim: Count
    ffn_dim: Width


class LoraWeights(ModelMixin, ConfigMixin):
    """The trainable matrices of a LoRA: for each layer W (out, in) of TARGETS, A (rank, in) and B (out, rank).

    alpha is the rank, so the layer computes W·x + B·A·x. B starts at zero: the backbone's output is unchanged.

    Args:
        rank: of every layer.
        num_layers, num_attention_heads, attention_head_dim, ffn_dim: of the backbone's config.
    """

    @register_to_config
    def __init__(self, rank: int, num_layers: int, num_attention_heads: int, attention_head_dim: int, ffn_dim: int):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        sizes = {"ffn.net.0.proj": (width, ffn_dim), "ffn.net.2": (ffn_dim, width)}
        for block in range(num_layers):
            for target in TARGETS:
                inputs, outputs = sizes.get(target, (width, width))
                pair = nn.ModuleDict(
                    {"lora_A": nn.Linear(inputs, rank, bias=False), "lora_B": nn.Linear(rank, outputs, bias=False)}
                )
                nn.init.zeros_(pair["lora_B"].weight)  # type: ignore[arg-type]
                _place(self, f"blocks.{block}.{target}", pair)

    @staticmethod
    def config_of(transformer_config: Mapping[str, Any], rank: int) -> dict[str, Any]:
        """Return the config of a LoRA of this rank for a backbone's config."""
        names = [name for name in LoraConfig.__annotations__ if name != "rank"]
        return {"rank": rank} | {name: transformer_config[name] for name in names}

    def pairs(self) -> dict[str, nn.ModuleDict]:
        """Return {name of the backbone's layer: its matrices}."""
        return {
            name: module
            for name, module in self.named_modules()
            if isinstance(module, nn.ModuleDict) and "lora_A" in module
        }

    def attach(self, transformer: WanTransformer3DModel) -> None:
        """Let a backbone's layers add this LoRA, in place, and freeze the backbone's own weights.

        The modules of the matrices are shared: an engine that splits the backbone splits them here too.

        Raises:
            InputError: peft is not installed.
        """
        config = require_peft().LoraConfig(
            r=self.config.rank, lora_alpha=self.config.rank, target_modules=list(TARGETS), init_lora_weights=False
        )
        transformer.requires_grad_(False)
        transformer.add_adapter(config)
        for name, pair in self.pairs().items():
            layer = transformer.get_submodule(name)
            layer.lora_A["default"], layer.lora_B["default"] = pair["lora_A"], pair["lora_B"]
            # Autocast casts the input. peft would first make an fp32 copy of it, twice as large as the input itself.
            layer.cast_input_dtype_enabled = False
        self.requires_grad_(True)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write config.json and WEIGHTS, in the layout that `load_lora_weights` of Diffusers' pipelines reads."""
        self.save_config(save_directory)
        save_lora(Path(save_directory) / WEIGHTS, self)

    @classmethod
    def load(cls, folder: str | Path) -> "LoraWeights":
        """Load what `save_pretrained` has written.

        Raises:
            InputError: it is missing or damaged.
        """
        config = read_config(folder, "_class_name", cls.__name__, LoraConfig)
        with torch.device("meta"):
            lora = cls.from_config(config)
        file = LoraFile(complete_folder(folder))
        tensors = {name.removeprefix("transformer."): tensor for name, tensor in file.tensors().items()}
        expected = lora.state_dict()
        unfit = [name for name, t in tensors.items() if name not in expected or t.shape != expected[name].shape]
        require_complete(file.path, expected.keys() - tensors.keys(), unfit)
        # Copied: tensors read in place lie at unaligned addresses, for which a CPU may round differently.
        lora.load_state_dict({name: tensor.float().clone() for name, tensor in tensors.items()}, assign=True)
        return lora


def _place(root, path, module):
    """Put a module at a dotted path, in plain modules that are made where they are missing."""
    *parents, name = path.split(".")
    for parent in parents:
        if parent not in root._modules:
            root.add_module(parent, nn.Module())
        root = root._modules[parent]
    root.add_module(name, module)


def require_peft() -> Any:
    """Return the module peft.

    Raises:
        InputError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError("--lora_rank: needs peft; pip install peft==0.21.2") from error
    return peft


def save_lora(path: Path, lora: LoraWeights, comfyui: bool = False, dtype: torch.dtype | None = None) -> None:
    """Write a LoRA as one safetensors file, complete or absent.

    Args:
        path: the file.
        lora: its alpha is its rank.
        comfyui: use Wan's original names, as ComfyUI and DiffSynth do, instead of Diffusers' layout.
        dtype: of the file; None: as the weights are.
    """
    weights = {name: tensor.detach().to(dtype).contiguous() for name, tensor in lora.state_dict().items()}
    rank, metadata, tensors = lora.config.rank, {"format": "pt"}, {}
    if comfyui:
        names = original_names([f"{name}.weight" for name in lora.pairs()])
        for name in lora.pairs():
            module = "diffusion_model." + names[f"{name}.weight"].removesuffix(".weight")
            tensors[f"{module}.lora_down.weight"] = weights[f"{name}.lora_A.weight"]
            tensors[f"{module}.lora_up.weight"] = weights[f"{name}.lora_B.weight"]
            tensors[f"{module}.alpha"] = torch.tensor(float(rank))
    else:
        tensors = {f"transformer.{name}": tensor for name, tensor in weights.items()}
        entries = {"r": rank, "lora_alpha": rank, "target_modules": list(TARGETS)}
        entries = {f"transformer.{name}": value for name, value in entries.items()}
        metadata[LORA_ADAPTER_METADATA_KEY] = json.dumps(entries, indent=2, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, save(tensors, metadata))
