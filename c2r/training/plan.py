"""The datasets and models of a run, found and checked before any weight is read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, TypeVar

import torch
from diffusers import ModelMixin, WanTransformer3DModel

from c2r import InputError
from c2r.data.clips import Clip, Clips
from c2r.data.mixture import Mixture, read_mixture, read_on_all
from c2r.encoding.cache import current_encoders, encoder_fingerprint
from c2r.encoding.encoding_pass import encode_control, encode_missing
from c2r.encoding.missing import find_missing, find_missing_control
from c2r.estimation.configs import ModelConfigs
from c2r.models.attention import try_attention_backend
from c2r.models.backbone import check_transformer, quantised_types, read_transformer_config
from c2r.models.control_projection import (
    FIT,
    check_projection,
    most_directions,
    require_same_dinov3,
)
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet, layers_of
from c2r.models.controlnet_files import control_start_config, read_controlnet_config
from c2r.models.dinov3 import check_dinov3, read_dinov3_config
from c2r.models.hub import resolve_model_folder
from c2r.models.lora import LoraWeights, require_peft
from c2r.models.parts import ENCODERS, check_pipeline_parts
from c2r.training.failing_together import failing_together
from c2r.training.preflight import (
    count_parameters,
    fingerprint_backbone,
    preflight,
    require_access,
    require_splittable,
)
from c2r.training.resume import config_defaults, require_resumable
from c2r.training.run import Run


@dataclass
class Plan:
    """The datasets and models of a run."""

    backbone: str  #: folder, hub name or file that the backbone is loaded from
    model_class: type[ModelMixin]  #: of the model that trains
    config: dict[str, Any]  #: of the model that trains
    real: Mixture
    cg: Mixture | None = None
    scenes: Mixture | None = None  #: the clips of --sample_dataset
    inputs: dict[str, str] = field(default_factory=dict)  #: fingerprints of everything that a resumed run must share
    feature_dim: int = 0  #: width of DINOv3's features
    num_trainable: int = 0  #: number of parameters that train

    @property
    def mixtures(self) -> list[Mixture]:
        """The mixtures that are trained on."""
        return [self.real, self.cg] if self.cg else [self.real]


def check_phase1(run: Run) -> Plan:
    """Check everything that can be refused before a weight is read, the cheapest first. Call it on every process.

    Raises:
        InputError: access, models, datasets, batches, memory, disk or checkpoint do not allow the run.
    """
    args, base_model = run.args, run.args.pretrained_model_name_or_path
    if args.lora_rank is not None:
        require_peft()
    require_access(base_model)
    backbone = args.dit_path or base_model
    config = read_transformer_config(backbone, base_model)
    _check_attention(run, config)
    plan = Plan(backbone, WanTransformer3DModel, config, *_read_mixtures(run))
    plan.num_trainable, num_frozen = count_parameters(WanTransformer3DModel, config), 0
    if args.lora_rank is not None:
        plan.model_class, plan.config = LoraWeights, LoraWeights.config_of(config, args.lora_rank)
        num_frozen = plan.num_trainable
        plan.num_trainable = count_parameters(LoraWeights, plan.config)
    preflight(run, plan.mixtures, ModelConfigs(config), plan.num_trainable, num_frozen)
    _check_inputs(run, plan)
    check_pipeline_parts(base_model)
    check_transformer(backbone, base_model)
    if args.lora_rank is not None:
        option = "dit_path" if args.dit_path else "pretrained_model_name_or_path"
        plan.inputs["backbone"] = fingerprint_backbone(run.accelerator, option, backbone, base_model)
        _check_inputs(run, plan)  # again, with the fingerprint that took long
    elif run.checkpoint is not None:
        plan.backbone = str(run.checkpoint / "model")
    return plan


def check_phase2(run: Run) -> Plan:
    """Check everything that can be refused before a model is loaded, as `check_phase1` does.

    The backbone's weights are read once, for its fingerprint.
    """
    args, base_model = run.args, run.args.pretrained_model_name_or_path
    require_access(base_model, args.dinov3)
    backbone_config = read_transformer_config(args.resume_backbone_from, base_model)
    _check_attention(run, backbone_config)
    layers = layers_of(args.injection, args.control_layers, args.control_stride, backbone_config["num_layers"])
    feature_dim, num_dinov3 = check_dinov3(args.dinov3, [bucket[1:] for bucket in run.settings.buckets])
    config = {name: backbone_config[name] for name in SHARED_CONFIG}
    config |= {"injection_layers": layers, "injection": args.injection, "feature_dim": feature_dim}
    config["causal_control"] = args.causal_control
    if run.checkpoint is not None:
        directions = read_controlnet_config(run.checkpoint / "model").get("control_directions")
    elif args.resume_controlnet_from is not None:
        directions = _require_control_start(args.resume_controlnet_from, config, backbone_config)
    else:
        directions = None
    if run.checkpoint is None and args.control_projection is not None:
        directions = _control_directions(args, feature_dim)
    if directions is None and args.control_tail_drop > 0:
        remedy = "" if run.checkpoint else "give --control_projection, or "  # a run cannot get one later
        raise InputError(
            f"--control_tail_drop {args.control_tail_drop:g}: the control has no projection; {remedy}leave this out"
        )
    config["control_directions"] = directions
    real, cg, scenes = _read_mixtures(run)
    plan = Plan(args.resume_backbone_from, C2RControlNet, config, real, cg, scenes, feature_dim=feature_dim)
    num_projection = 0 if directions is None else (1 + directions) * feature_dim  # frozen: mean and directions
    plan.num_trainable = count_parameters(C2RControlNet, config) - num_projection
    num_frozen = count_parameters(WanTransformer3DModel, backbone_config) + num_dinov3
    dinov3_config = dict(read_dinov3_config(resolve_model_folder(args.dinov3)))
    quantised = quantised_types(args.resume_backbone_from, base_model)
    configs = ModelConfigs(backbone_config, dinov3=dinov3_config, quantised=quantised)
    preflight(run, plan.mixtures, configs, plan.num_trainable, num_frozen + num_projection)
    plan.inputs["DINOv3"] = encoder_fingerprint(resolve_model_folder(args.dinov3))
    if run.checkpoint is None and args.control_projection not in (None, FIT):
        chosen = check_projection(args.control_projection, feature_dim)
        require_same_dinov3(args.control_projection, chosen, plan.inputs["DINOv3"])
    _check_inputs(run, plan)
    check_pipeline_parts(base_model, [*ENCODERS, "scheduler"])
    check_transformer(plan.backbone, base_model)
    option = "resume_backbone_from"
    plan.inputs["backbone"] = fingerprint_backbone(run.accelerator, option, plan.backbone, base_model)
    _check_inputs(run, plan)  # again, with the fingerprint that took long
    return plan


def _control_directions(args, feature_dim):
    """Return the number of directions of the control's projection, of one that is yet to be fitted the most."""
    given = args.control_directions
    if args.control_projection != FIT:
        chosen = check_projection(args.control_projection, feature_dim, given)
        return given or chosen["directions"]
    most = most_directions(feature_dim)
    if (given or 1) > most:
        raise InputError(
            f"--control_directions {given or 1}: features of width {feature_dim} have at most {most} directions; give "
            "fewer"
        )
    return given or most


def _require_control_start(name_or_path, config, backbone_config):
    """Check that the weights to start from have the shape that the options describe; return their directions."""
    given = config_defaults(C2RControlNet) | control_start_config(name_or_path, backbone_config)
    option = f"--resume_controlnet_from {name_or_path}"
    injection, layers = given["injection"], given["injection_layers"]
    if injection != config["injection"]:
        raise InputError(f"{option}: has injection {injection}; give --injection {injection}")
    if given["causal_control"] != config["causal_control"]:
        remedy = "leave --causal_control out" if config["causal_control"] else "give --causal_control"
        raise InputError(f"{option}: its adapter is {'not ' * config['causal_control']}causal; {remedy}")
    if layers != config["injection_layers"]:
        stride = layers[1] - layers[0] if len(layers) > 1 else 1
        raise InputError(
            f"{option}: has {len(layers)} control blocks after blocks {', '.join(map(str, layers))}; give "
            f"--control_layers {len(layers)} --control_stride {stride}"
        )
    if given["feature_dim"] != config["feature_dim"]:
        raise InputError(
            f"{option}: takes features of width {given['feature_dim']}, --dinov3 gives {config['feature_dim']}; give "
            "the DINOv3 that it was trained with"
        )
    return given.get("control_directions")


def _check_attention(run, backbone_config):
    degree, head_dim = run.args.context_parallel_degree, backbone_config["attention_head_dim"]
    num_heads, patch_size = backbone_config["num_attention_heads"], backbone_config["patch_size"]
    require_splittable(degree, num_heads, patch_size, run.settings.buckets)
    with failing_together(run.accelerator, run.args.output_dir):
        try_attention_backend(run.args.attention_backend, head_dim, run.device, run.weight_dtype, backward=True)


def _read_mixtures(run):
    """Read the run's datasets on every process; return the real mixture, the CG one and that of --sample_dataset."""

    def read():
        def mixture(addresses, domain):
            return read_mixture(addresses, domain, run.settings, current_encoders(run.settings)) if addresses else None

        scenes = getattr(run.args, "sample_dataset", None)  # phase 1 has no such options
        return (
            mixture(run.args.real_dataset, "real"),
            mixture(getattr(run.args, "cg_dataset", None), "cg"),
            mixture([scenes] if scenes else None, "cg"),
        )

    return read_on_all(read, run.accelerator, run.watchdog)


def _check_inputs(run, plan):
    """Add the datasets' fingerprints to the plan, and check that the checkpoint was written with the same inputs."""
    plan.inputs |= {f"{mixture.domain} dataset": mixture.fingerprint for mixture in plan.mixtures}
    if run.checkpoint is not None:
        require_resumable(run.checkpoint, run.accelerator, run.args, plan.model_class, plan.config, plan.inputs)


class ChosenClips(Protocol):
    """The clips that a phase has chosen from its datasets."""

    @property
    def train(self) -> list[Clips]:
        """Clips to train on, by domain."""

    @property
    def held_out(self) -> list[Clip]:
        """Clips that validation and samples need."""


C = TypeVar("C", bound=ChosenClips)


def encode_until_usable(
    run: Run, plan: Plan, choose: Callable[[Run, Plan], C], control_dtype: torch.dtype | None = None
) -> C:
    """Choose clips and encode those that are not cached. Call it on every process.

    A clip that cannot be encoded is noted with its reason; then the datasets are read again without it, and the clips
    are chosen again.

    Args:
        run: the script's run.
        plan: its mixtures are replaced if clips were dropped.
        choose: chooses the clips from the plan's mixtures.
        control_dtype: dtype of the control features to cache; None: control features are not cached.

    Raises:
        InputError: no room for the cache, or no clip is left.
    """
    args = run.args
    while True:
        chosen = choose(run, plan)
        if args.dry_run:
            _plan_encoding(run, plan, chosen, control_dtype)
        to_encode = chain(*chosen.train, chosen.held_out)
        passes = [encode_missing(to_encode, run.settings, run.accelerator, run.watchdog)]
        if control_dtype is not None:
            to_encode = chain(*chosen.train)
            passes.append(
                encode_control(to_encode, run.settings, args.dinov3, control_dtype, run.accelerator, run.watchdog)
            )
        for encoded in passes:
            run.timings.add_encoding(encoded)
        if not any(encoded.failures for encoded in passes):
            return chosen
        plan.real, plan.cg, plan.scenes = _read_mixtures(run)
        _check_inputs(run, plan)


def _plan_encoding(run, plan, chosen, control_dtype):
    """Record what the whole run would encode, of which a dry run encodes a few clips."""
    train = [mixture.train for mixture in plan.mixtures]
    run.timings.plan_encoding(find_missing(chain(*train, chosen.held_out), run.settings))
    if control_dtype is not None:
        missing = find_missing_control(chain(*train), run.settings, run.args.dinov3, control_dtype)
        run.timings.plan_encoding(missing)
