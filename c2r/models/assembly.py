"""Join the backbone and the control branch of a trained model for generation.

The backbone must be the one that the ControlNet or LoRA was trained on: their contract names its fingerprint.
"""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel

from c2r import InputError
from c2r.models.backbone import check_transformer, fingerprint_transformer, index_weights, load_transformer
from c2r.models.contract import CONTRACT, PhaseContract, read_contract, with_moved_models
from c2r.models.controlnet_files import check_controlnet, load_controlnet
from c2r.models.hub import WeightIndex
from c2r.models.lora_file import LoraFile
from c2r.models.parts import freeze
from c2r.models.transformer import C2RTransformer

logger = logging.getLogger(__name__)


def load_for_generation(
    folder: str | Path,
    backbone: str | Path | None = None,
    torch_dtype: torch.dtype | None = None,
    base: str | Path | None = None,
    loras: Iterable[LoraFile] = (),
) -> tuple[WanTransformer3DModel | C2RTransformer, PhaseContract]:
    """Load the trained model of a phase's best/ or final/, frozen, and its contract.

    Args:
        folder: best/ or final/. Phase 1 gives a `WanTransformer3DModel`, phase 2 a `C2RTransformer`.
        backbone: the backbone of a phase 2 folder, if it was moved since the contract was written, or a quantised copy
            of it (.gguf, or float8), which cannot be compared with it: a warning is logged.
        torch_dtype: dtype of the weights; None is fp32.
        base: the Wan pipeline that the backbone must fit, if it was moved.
        loras: added to the backbone.

    Raises:
        InputError: a part is missing, or the backbone is not the one that the ControlNet or LoRA was trained on, or
            one is given for a whole model of phase 1.
    """
    contract, loras = read_contract(folder), list(loras)
    _warn_of_other_backbones(loras, contract.backbone_sha256 if contract.has_backbone else contract.weights_sha256)
    if not contract.has_backbone:
        with_moved_models(contract, folder, backbone=backbone)
        return freeze(load_transformer(folder, torch_dtype=torch_dtype, loras=loras)), contract
    if contract.phase == 1:
        loras = [LoraFile(folder), *loras]
    moved = with_moved_models(contract, folder, base_model=base, backbone=backbone)
    assert moved.backbone is not None  # `PhaseContract` has checked it
    _require_backbone(folder, moved, may_differ=moved.backbone != contract.backbone)
    transformer = load_transformer(moved.backbone, moved.base_model, torch_dtype, loras=loras)
    if moved.phase == 1:
        return freeze(transformer), moved
    return freeze(C2RTransformer(transformer, load_controlnet(folder, torch_dtype))), moved


def check_model(
    folder: str | Path,
    contract: PhaseContract,
    backbone: str | Path | None = None,
    loras: Iterable[LoraFile] = (),
) -> None:
    """Check the weights that `load_for_generation` reads by configs and headers; fingerprints are not compared.

    Raises:
        InputError: see `load_for_generation`.
    """
    own = [LoraFile(folder)] if contract.lora_rank is not None else []
    whole = (backbone or contract.backbone) if contract.has_backbone else folder
    index_weights(whole, contract.base_model, [*own, *loras])
    if contract.phase == 2:
        check_controlnet(folder)


def _warn_of_other_backbones(loras, backbone_sha256):
    """Log a warning for each LoRA of a phase 1 that was trained on another backbone; other files do not say."""
    for lora in loras:
        folder = lora.path.parent
        if (folder / CONTRACT).is_file() and read_contract(folder).backbone_sha256 != backbone_sha256:
            logger.warning("--lora %s: was trained on another backbone than the one that it is added to", folder)


def _require_backbone(folder, contract, may_differ):
    """Check by its fingerprint that a contract's backbone is the one that the ControlNet or LoRA was trained on.

    `may_differ` accepts a quantised one with a warning, as it may be a copy of that one. A copy has no LoRA in it.
    """
    backbone = contract.backbone
    path, _ = check_transformer(backbone, contract.base_model)
    found = fingerprint_transformer(backbone, contract.base_model)
    if found == contract.backbone_sha256:
        return
    index = WeightIndex(path)
    has_lora = contract.lora_rank is not None or contract.backbone_base is not None
    if has_lora or not (may_differ and (index.is_gguf or index.float8)):
        raise InputError(
            f"{backbone}: not the backbone of {folder}: its fingerprint is {found}, it was trained on "
            f"{contract.backbone_sha256}; name that one with --backbone (in Python backbone=)"
        )
    logger.warning(
        "%s: its weights are quantised, so it cannot be checked that they are those that %s was trained on",
        *(backbone, folder),
    )
