"""Write the weights of a tiny transformer in all the layouts that users have them in."""

import json
from pathlib import Path

import gguf
import torch
from diffusers import WanTransformer3DModel
from safetensors.torch import save_file

#: Config entries of a `tiny_transformer` whose matrices have rows of 32 numbers, which GGUF quantises together.
IN_BLOCKS = {"num_attention_heads": 2, "attention_head_dim": 16, "ffn_dim": 64, "freq_dim": 32}

#: Layouts whose weights are equal to those that were written, bit for bit.
EXACT = (
    *("Diffusers folder", "Diffusers shards", "Diffusers file"),
    *("original file", "original folder", "original shards", "ComfyUI file"),
)
FLOAT8 = ("float8 file", "fp8_scaled file", "comfy_quant file", "comfy_quant metadata")
GGUF = ("Q8_0", "Q5_1", "Q4_0", "BF16", "F16")


def original_names(state_dict):
    """Return a text-to-video model's Diffusers state dict under Wan's original names."""
    renames = [
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn1", "self_attn"),
        ("attn2", "cross_attn"),
        (".to_out.0.", ".o."),
        (".to_q.", ".q."),
        (".to_k.", ".k."),
        (".to_v.", ".v."),
        ("norm2", "norm3"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
        ("proj_out", "head.head"),
    ]
    converted = {}
    for name, tensor in state_dict.items():
        for diffusers_name, original in renames:
            name = name.replace(diffusers_name, original)
        name = "head.modulation" if name == "scale_shift_table" else name.replace("scale_shift_table", "modulation")
        converted[name] = tensor.clone()
    return converted


def is_matrix(name, tensor):
    """Return True for weights that quantised files quantise: the matrices of the blocks."""
    return tensor.ndim == 2 and name.startswith("blocks.")


def write_form(form: str, folder: Path, model: WanTransformer3DModel) -> Path:
    """Write a model's weights in a layout of EXACT, FLOAT8 or GGUF; return the path that a user would give."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    original = original_names(weights)
    file = folder / "model.safetensors"
    match form:
        case "Diffusers folder":
            model.save_pretrained(folder)
        case "Diffusers shards":
            model.save_pretrained(folder, max_shard_size="20KB")
        case "Diffusers file":
            save_file(weights, file)
        case "original file":
            save_file(original, file)
        case "ComfyUI file":
            save_file(with_prefix(original), file)
        case "original folder":
            save_file(original, folder / "diffusion_pytorch_model.safetensors")
            write_original_config(folder, model)
        case "original shards":
            write_shards(folder, original)
            write_original_config(folder, model)
        case "float8 file":
            save_file(
                {
                    name: tensor.to(torch.float8_e4m3fn) if is_matrix(name, tensor) else tensor
                    for name, tensor in original.items()
                },
                file,
            )
        case "fp8_scaled file":
            save_file(with_prefix(scaled(original, "scale_weight")), file)
        case "comfy_quant file":
            save_file(scaled(original, "weight_scale"), file)
        case "comfy_quant metadata":
            quantised = scaled(original, "weight_scale")
            layers = [name.removesuffix(".comfy_quant") for name in quantised if name.endswith(".comfy_quant")]
            content = json.dumps({"format_version": "1.0", "layers": dict.fromkeys(layers, DESCRIPTION)})
            kept = {name: tensor for name, tensor in quantised.items() if not name.endswith(".comfy_quant")}
            save_file(kept, file, metadata={"_quantization_metadata": content})
        case _:
            return write_gguf(folder / "model.gguf", original, form)
    return file if file.is_file() else folder


DESCRIPTION = {"format": "float8_e4m3fn", "full_precision_matrix_mult": True}


def with_prefix(tensors):
    """Return tensors under ComfyUI's names."""
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def scaled(original, suffix):
    """Return weights in float8 with a scale per matrix, in the layout of ComfyUI that names it so."""
    tensors = {} if suffix == "weight_scale" else {"scaled_fp8": torch.empty(2, dtype=torch.float8_e4m3fn)}
    for name, tensor in original.items():
        if not is_matrix(name, tensor):
            tensors[name] = tensor
            continue
        layer, scale = name.removesuffix(".weight"), tensor.abs().max() / 448
        tensors[name] = (tensor / scale).to(torch.float8_e4m3fn)
        if suffix == "scale_weight":
            tensors |= {f"{layer}.scale_weight": scale.reshape(1), f"{layer}.scale_input": torch.ones(1)}
        else:
            description = json.dumps(DESCRIPTION).encode()
            tensors |= {f"{layer}.weight_scale": scale, f"{layer}.input_scale": torch.ones(())}
            tensors[f"{layer}.comfy_quant"] = torch.tensor(list(description), dtype=torch.uint8)
    return tensors


def write_shards(folder, tensors):
    """Write tensors as two shards and their index."""
    names = sorted(tensors)
    parts = names[::2], names[1::2]
    index = {}
    for number, part in enumerate(parts, start=1):
        shard = f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard)
        index |= dict.fromkeys(part, shard)
    content = {"metadata": {"total_size": 0}, "weight_map": index}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(content))


def original_config(model):
    """Return the config.json of Wan's own repositories for a model."""
    config = model.config
    return {
        "_class_name": "WanModel",
        "_diffusers_version": "0.30.0",
        "dim": config.num_attention_heads * config.attention_head_dim,
        "eps": config.eps,
        "ffn_dim": config.ffn_dim,
        "freq_dim": config.freq_dim,
        "in_dim": config.in_channels,
        "model_type": "t2v",
        "num_heads": config.num_attention_heads,
        "num_layers": config.num_layers,
        "out_dim": config.out_channels,
        "text_len": 512,
        "text_dim": config.text_dim,  # Wan's own leave it out: it is always 4096
    }


def write_original_config(folder, model, **changes):
    """Write the config.json of Wan's own repositories for a model."""
    (folder / "config.json").write_text(json.dumps(original_config(model) | changes))


def write_gguf(path, original, kind):
    """Write weights as ComfyUI-GGUF does: matrices in one type, norms, biases and small tensors in fp32."""
    kind = gguf.GGMLQuantizationType[kind]
    block, _ = gguf.GGML_QUANT_SIZES[kind]
    writer = gguf.GGUFWriter(path, "wan")
    for name, tensor in original.items():
        array = tensor.float().numpy()
        if tensor.ndim == 2 and tensor.shape[-1] % block == 0:
            writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
