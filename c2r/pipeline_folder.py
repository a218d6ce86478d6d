"""The folder of a `C2RPipeline`: find and load its parts, and write them with the contract and the model card."""

import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import SchedulerMixin, WanPipeline
from torch import nn

from c2r import InputError
from c2r.files import atomic_folder, complete_folder, read_json
from c2r.models import released
from c2r.models.adversary import takes_control
from c2r.models.assembly import load_for_generation
from c2r.models.attention import use_lean_attention
from c2r.models.backbone import load_transformer
from c2r.models.card import SAMPLES, find_samples, model_card
from c2r.models.contract import (
    CONTRACT,
    MODEL_ENTRIES,
    MODEL_INDEX,
    PhaseContract,
    fetch_model,
    read_contract,
    with_moved_models,
    write_contract,
)
from c2r.models.controlnet_files import load_control_start, load_controlnet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.hub import fingerprint_files
from c2r.models.lora_file import LoraFile
from c2r.models.parts import freeze, load_pipeline_part
from c2r.models.transformer import C2RTransformer

#: Parts that a folder of Diffusers names in its model_index.json, but the transformer.
BASE_PARTS = ("scheduler", "tokenizer", "vae", "text_encoder")
#: Classes of the pipelines whose folders can be loaded.
PIPELINES = ("WanPipeline", "C2RPipeline")
#: Entries of the contract of a pipeline's folder that name a part in it.
OWN_FOLDERS = {"backbone": "./transformer", "dinov3": "./dinov3"}


@dataclass(frozen=True)
class LoadedParts:
    """The parts of a pipeline, and what is known of their training."""

    components: dict[str, Any]  #: {name of an argument of `C2RPipeline`: part}; those that were given included
    contract: PhaseContract | None  #: of the folder, or of the release; None for a pipeline of Diffusers
    samples: Path | None  #: folder whose samples are of these parts, see `find_samples`


def load_parts(
    name_or_path: str | Path,
    torch_dtype: torch.dtype | None,
    backbone: str | Path | None,
    base: str | Path | None,
    loras: Iterable[LoraFile],
    controlnet: str | Path | None,
    given: dict[str, Any],
) -> LoadedParts:
    """Load the parts of a pipeline, the scheduler with the shift of training.

    Args:
        name_or_path, torch_dtype, backbone, base, loras, controlnet: see `C2RPipeline.from_pretrained`.
        given: its `components`, parts that are not loaded.

    Raises:
        InputError: a part is missing, damaged, or not the one of training.
    """
    # 1. Find the folder, its contract, and the models that it names.
    base, backbone, given = _absolute(base), _absolute(backbone), {part: _absolute(given[part]) for part in given}
    folder = fetch_model(name_or_path, without=given)
    index = _read_model_index(folder)
    contract: PhaseContract | None = None
    samples: Path | None = None
    dinov3: Any = folder / "dinov3" if (folder / "dinov3").is_dir() else None
    if index is None or (folder / CONTRACT).is_file():
        trained = _read_contract(folder, name_or_path, base, backbone, given)
        contract = with_replaced_parts(trained, given)
        samples = folder if contract == trained else None
        base, dinov3 = contract.base_model, contract.dinov3
    base_name, base = base or _absolute(name_or_path), base or folder
    dinov3 = given.get("dinov3", dinov3)

    if controlnet is not None:
        has_control = (contract is not None and contract.phase == 2) or (folder / "controlnet").is_dir()
        _check_released_control(controlnet, has_control, "transformer" in given, dinov3)

    # 2. Load what is not given.
    absent = () if index is None or os.path.realpath(base) != os.path.realpath(folder) else _absent_parts(index)
    components = dict(given)
    for part in (part for part in BASE_PARTS if part not in given):
        dtype = torch_dtype if part == "text_encoder" else None
        components[part] = None if part in absent else load_pipeline_part(base, part, dtype)
    if "transformer" not in given:
        if contract is None:
            transformer = _load_without_contract(folder, backbone or folder, base, torch_dtype, loras)
        else:
            transformer, _ = load_for_generation(folder, backbone, torch_dtype, base, loras)
        if controlnet is not None:
            transformer = _with_released_control(transformer, controlnet, torch_dtype)
        use_lean_attention(transformer)
        components["transformer"] = transformer
    if controlnet is not None:
        contract = _released_contract(base_name, backbone or _absolute(name_or_path), dinov3, contract)
    if isinstance(dinov3, str | Path):
        dinov3 = DINOv3FeatureExtractor.from_pretrained(dinov3, torch_dtype)
    components["dinov3"] = dinov3
    if contract is not None and contract.flow_shift is not None and "scheduler" not in given:
        components["scheduler"] = with_flow_shift(components["scheduler"], contract.flow_shift)
    return LoadedParts(components, contract, samples)


def _absolute(part):
    """Return a local path as an absolute one, which no contract takes for a hub name; all else as it is."""
    is_local = isinstance(part, str | Path) and complete_folder(part).exists()
    return os.path.abspath(part) if is_local else part  # not the real path: files of the hub's cache are links


def _read_model_index(folder):
    """Return the list of a pipeline folder's parts, or None if it is the folder of a phase.

    Raises:
        InputError: it is damaged, or of another pipeline than Wan 2.1's text to video.
    """
    path = folder / MODEL_INDEX
    if not path.is_file():
        return None
    index = read_json(path)
    name = index.get("_class_name")
    if name not in PIPELINES:
        raise InputError(f"{path}: its pipeline is {name}; give one of Wan 2.1 text to video")
    if "transformer_2" not in _absent_parts(index) or index.get("boundary_ratio") or index.get("expand_timesteps"):
        raise InputError(f"{path}: this is a Wan 2.2 pipeline; give one of Wan 2.1 text to video")
    return index


def _absent_parts(index):
    """Return the parts that a pipeline folder does not have."""
    return [part for part in (*BASE_PARTS, "transformer_2") if index.get(part) in (None, [None, None])]


def _read_contract(folder, name_or_path, base, backbone, given):
    """Return the contract of a folder, with the models that a user names in place of its own."""
    named = {"base_model": base, "backbone": backbone, "dinov3": None}
    # Models that are replaced need not be where the contract says.
    if "dinov3" in given:
        del named["dinov3"]
    if "transformer" in given:
        del named["backbone"]
    contract = read_contract(folder)
    moved = with_moved_models(contract, name_or_path, **named)
    if moved.base_model == contract.base_model:
        return moved
    # The backbone has the contract's fingerprint, but another base may be of other models.
    return replace(moved, copied_from={e: name for e, name in moved.copied_from.items() if e != "base_model"})


def _load_without_contract(folder, backbone, base, torch_dtype, loras):
    """Load the transformer of a pipeline folder without contract, with the ControlNet if there is one."""
    transformer = load_transformer(backbone, base, torch_dtype, loras=loras)
    if (folder / "controlnet").is_dir():
        transformer = C2RTransformer(transformer, load_controlnet(folder, torch_dtype))
    return freeze(transformer)


def _check_released_control(controlnet, has_control, has_transformer, dinov3):
    """Refuse what does not fit the released control weights before any weight is read."""
    if not os.path.isfile(controlnet):
        raise InputError(
            f"controlnet={controlnet}: not a file; give that of the released C2R. A phase 2 folder is loaded itself, "
            "C2RPipeline.from_pretrained(FOLDER), with backbone= if its backbone was moved"
        )
    if has_control:
        raise InputError(
            f"controlnet={controlnet}: this model has control already; give a Wan 2.1 pipeline or phase 1"
        )
    if dinov3 is None or has_transformer:
        raise InputError(f"controlnet={controlnet}: needs dinov3 and no transformer; give dinov3=")


def _with_released_control(transformer, controlnet, torch_dtype):
    """Join a backbone and the released control weights, frozen."""
    return freeze(C2RTransformer(transformer, load_control_start(controlnet, transformer.config, torch_dtype)))


def _released_contract(base, backbone, dinov3, phase1):
    """Return the contract of a pipeline with the released control.

    `dinov3` is a name, a path or a model; `phase1` the contract of the folder that the control is added to, or None.
    """
    copied_from = {} if phase1 is None else phase1.copied_from
    return PhaseContract(
        phase=2,
        base_model=str(base),
        step=0,
        **released.FORMAT,
        backbone=str(backbone),
        backbone_sha256="",  # computed when saved: at 14B it takes minutes
        dinov3=str(dinov3) if isinstance(dinov3, str | Path) else OWN_FOLDERS["dinov3"],
        copied_from={entry: name for entry, name in copied_from.items() if entry == "base_model"},
    )


def with_replaced_parts(contract: PhaseContract, given: Mapping[str, Any]) -> PhaseContract:
    """Return the contract of a model with another transformer or DINOv3, without what was measured with the old one.

    Args:
        contract: of the model before.
        given: parts by the names of the arguments of `C2RPipeline`, a DINOv3 also by hub name or path. None, which
            leaves a part out, and parts that no entry of the contract describes change nothing.
    """
    changed: dict[str, Any] = {"validation_loss": None, "metrics": {}}
    transformer, dinov3 = given.get("transformer"), given.get("dinov3")
    if isinstance(dinov3, str | Path) and str(dinov3) == contract.dinov3:
        dinov3 = None
    if dinov3 is not None:
        changed["dinov3"] = str(dinov3) if isinstance(dinov3, str | Path) else OWN_FOLDERS["dinov3"]
    if transformer is not None:
        changed |= {"step": 0, "dataset_fingerprints": {}, "num_clips": {}}
        changed |= {"backbone": OWN_FOLDERS["backbone"]} if contract.backbone is not None else {}
    if transformer is None and dinov3 is None:
        return contract
    copied_from = {entry: name for entry, name in contract.copied_from.items() if entry not in changed}
    return replace(contract, copied_from=copied_from, **changed)


def write_folder(
    folder: str | Path,
    pipeline: WanPipeline,
    contract: PhaseContract | None,
    samples_of: Path | None,
    name: str,
    max_shard_size: int | str | None = None,
) -> None:
    """Write the folder of `C2RPipeline.save_pretrained`.

    Args:
        folder: complete or absent (see `atomic_folder`).
        pipeline: a `C2RPipeline`.
        contract: of the model that it was loaded from; without one, neither contract nor card is written.
        samples_of: folder whose samples go into the card, see `find_samples`.
        name: name that the card's code loads.
        max_shard_size: see `C2RPipeline.save_pretrained`.

    Raises:
        InputError: the folder has files already, or the transformer has a LoRA that is not fused, or is quantised.
    """
    folder = Path(os.path.realpath(folder))
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder}: has files already; give a new folder")
    controlled = takes_control(pipeline.transformer)
    backbone = pipeline.transformer.transformer if controlled else pipeline.transformer
    if getattr(backbone, "peft_config", None):
        raise InputError(
            f"{folder}: not written, because the transformer has a LoRA; call pipeline.fuse_lora() and then "
            "pipeline.unload_lora_weights(), or unload it alone"
        )
    if getattr(backbone, "hf_quantizer", None) is not None:
        raise InputError(
            f"{folder}: not written, because the transformer is quantised; load it unquantised to save it"
        )
    parts = {part: getattr(pipeline, part) for part in BASE_PARTS} | {"transformer": backbone}
    index = {"_class_name": type(pipeline).__name__, "_diffusers_version": diffusers.__version__}
    sharded: dict[str, Any] = {} if max_shard_size is None else {"max_shard_size": max_shard_size}
    with atomic_folder(folder) as temporary:
        for part, model in parts.items():
            index[part] = [None, None]
            if model is not None:
                index[part] = [type(model).__module__.partition(".")[0], type(model).__name__]
                model.save_pretrained(temporary / part, **(sharded if isinstance(model, nn.Module) else {}))
        # Not in the index: a stock WanPipeline would refuse classes that Diffusers does not have.
        if controlled:
            pipeline.transformer.controlnet.save_pretrained(temporary / "controlnet", **sharded)
        if pipeline.dinov3 is not None:
            pipeline.dinov3.save_pretrained(temporary / "dinov3", **sharded)
        (temporary / MODEL_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        if contract is not None and backbone is not None:
            contract = contract_of_folder(temporary, contract, pipeline.scheduler)
            write_contract(temporary, contract)
            samples = samples_of and find_samples(samples_of, contract.step)
            if samples:
                shutil.copyfile(samples, temporary / SAMPLES)
            write_card(temporary, contract, name)


def write_card(folder: Path, contract: PhaseContract, name: str) -> None:
    """Write README.md of a pipeline's folder; `name` is the one that its code loads."""
    card = model_card(contract, name, has_samples=(folder / SAMPLES).is_file())
    (folder / "README.md").write_text(card, encoding="utf-8")


def contract_of_folder(folder: Path, contract: PhaseContract, scheduler: SchedulerMixin | None) -> PhaseContract:
    """Return the contract of a folder with the parts of a pipeline; paths in it are relative to the folder.

    Args:
        folder: has transformer/, and controlnet/ and dinov3/ if the pipeline has them.
        contract: of the model that the pipeline was loaded from.
        scheduler: the pipeline's.
    """
    names = {entry: getattr(contract, entry) for entry in MODEL_ENTRIES}
    of_hub = {entry: name for entry, name in names.items() if name and not os.path.isabs(name) and name[0] != "."}
    changed: dict[str, Any] = {
        "base_model": ".",
        "flow_shift": _flow_shift(scheduler),
        "copied_from": contract.copied_from | of_hub,
        **dict.fromkeys(("lora_rank", "backbone_base")),  # a LoRA of training is fused in the saved backbone
    }
    if (folder / "dinov3").is_dir():
        changed["dinov3"] = OWN_FOLDERS["dinov3"]
    sha256 = fingerprint_files(folder / "transformer")  # it changes with the dtype
    if not (folder / "controlnet").is_dir():
        changed |= {"backbone": None, "backbone_sha256": None}
        return replace(contract, phase=1, weights_sha256=sha256, **changed)
    changed |= {"backbone": OWN_FOLDERS["backbone"], "backbone_sha256": sha256}
    return replace(contract, phase=2, weights_sha256=fingerprint_files(folder / "controlnet"), **changed)


#: Names of the shift of the noise levels in the configs of Diffusers' schedulers.
SHIFT_ENTRIES = ("flow_shift", "shift")


def with_flow_shift(scheduler: SchedulerMixin, flow_shift: float) -> SchedulerMixin:
    """Return a scheduler of the same class and config with another shift of the noise levels.

    Args:
        scheduler: Wan's own UniPC, or any flow-matching scheduler of Diffusers.
        flow_shift: see `flow_matching.shift_sigmas`.

    Raises:
        InputError: if the scheduler has no shift.
    """
    for name in SHIFT_ENTRIES:
        if name in scheduler.config:
            return type(scheduler).from_config(scheduler.config, **{name: flow_shift})
    raise InputError(
        f"--flow_shift {flow_shift}: {type(scheduler).__name__} has no shift; use the scheduler of a Wan 2.1 folder"
    )


def _flow_shift(scheduler):
    """Return a scheduler's shift of the noise levels, or None if it has none."""
    config = {} if scheduler is None else scheduler.config
    return next((config[name] for name in SHIFT_ENTRIES if name in config), None)
