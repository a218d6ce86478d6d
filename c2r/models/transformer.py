"""Backbone and control branch in one forward."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin, WanTransformer3DModel
from diffusers.hooks import (
    FasterCacheConfig,
    HookRegistry,
    ModelHook,
    PyramidAttentionBroadcastConfig,
)
from diffusers.hooks.hooks import StateManager
from diffusers.hooks.pyramid_attention_broadcast import PyramidAttentionBroadcastState
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.cache_utils import CacheMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn

from c2r.models.checkpointing import run_checkpointed
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet

_STEERING_HOOK = "c2r_steering"


class C2RTransformer(ModelMixin, CacheMixin, AttentionMixin, PeftAdapterMixin):
    """The frozen Wan backbone with a trainable control branch, as one module that any training engine can wrap.

    The forward is the backbone's own, so hooks on the backbone run, and on each of its submodules; it runs each
    control block right after the backbone's block that the residual is added to. Engines that shard wrap
    `C2RControlBlock`, `WanTransformerBlock` and the outermost module, not `controlnet`: this one is never called as a
    whole, so a hook on it would not run.

    Diffusers' switches are those of `ModelMixin`. PEFT adapters are the backbone's, as LoRA files name its layers.

    Args:
        transformer: text-to-video backbone. It is frozen here.
        controlnet: control branch made for a backbone of this shape.

    Raises:
        ValueError: if the two do not fit each other.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["WanTransformerBlock", "C2RControlBlock"]  # noqa: RUF012 (here and below: Diffusers' types)
    _repeated_blocks = ["WanTransformerBlock", "C2RControlBlock"]  # noqa: RUF012
    _keep_in_fp32_modules = sorted(
        {*WanTransformer3DModel._keep_in_fp32_modules, *C2RControlNet._keep_in_fp32_modules}
    )
    _skip_layerwise_casting_patterns = [  # noqa: RUF012
        *WanTransformer3DModel._skip_layerwise_casting_patterns,
        "control_adapter",
    ]
    # What block-level group offloading looks into for lists of blocks, and the adapter, whose forward runs by itself.
    _group_offload_block_modules = ["transformer", "controlnet", "control_adapter"]  # noqa: RUF012

    def __init__(self, transformer: WanTransformer3DModel, controlnet: C2RControlNet):
        super().__init__()
        for name in SHARED_CONFIG:
            backbone, control = transformer.config[name], controlnet.config[name]
            if backbone != control:
                raise ValueError(f"the ControlNet is for a backbone with {name} {control}, this one has {backbone}")
        self.transformer = transformer.requires_grad_(False).eval()
        self.controlnet = controlnet
        if not controlnet.control_blocks:  # engines refuse names of modules that do not exist
            self._no_split_modules = ["WanTransformerBlock"]
        self.gradient_checkpointing = False
        self._gradient_checkpointing_func: Callable[..., Any] = run_checkpointed

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | PathLike, **options: Any) -> "C2RTransformer":
        """Load a folder of `save_pretrained`, or a pipeline's folder, in eval mode.

        Args:
            pretrained_model_name_or_path: folder or hub name with `transformer/` and `controlnet/`.
            options: of Diffusers' `ModelMixin.from_pretrained`, for both parts, such as `torch_dtype` and `variant`.
        """
        folder = Path(options.pop("subfolder", None) or "")
        transformer, controlnet = (
            part.from_pretrained(pretrained_model_name_or_path, subfolder=str(folder / name), **options)
            for part, name in ((WanTransformer3DModel, "transformer"), (C2RControlNet, "controlnet"))
        )
        return cls(transformer, controlnet).eval()

    def save_pretrained(
        self,
        save_directory: str | PathLike,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
    ) -> None:
        """Write both parts: `transformer/`, a stock WanTransformer3DModel, and `controlnet/`.

        The arguments are those of Diffusers' `ModelMixin.save_pretrained`, for both parts.
        """
        for name in ("transformer", "controlnet"):
            getattr(self, name).save_pretrained(
                Path(save_directory) / name,
                is_main_process,
                save_function,
                safe_serialization,
                variant,
                max_shard_size,
            )

    @property
    def config(self):
        """The backbone's config."""
        return self.transformer.config

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        return self.transformer.dtype

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return self.transformer.device

    def train(self, mode: bool = True):
        """Set training mode on the control branch; the backbone stays in eval mode."""
        super().train(mode)
        self.transformer.eval()
        return self

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that phase 2 optimizes."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None):
        """Keep one input per block for the backward pass and recompute the rest.

        Args:
            gradient_checkpointing_func: called with a block and its inputs; None is `run_checkpointed`.
        """
        self.gradient_checkpointing = True
        self._gradient_checkpointing_func = gradient_checkpointing_func or run_checkpointed

    def disable_gradient_checkpointing(self):
        """Keep all activations for the backward pass."""
        self.gradient_checkpointing = False

    def compile_repeated_blocks(self, *args, **compile_options):
        """Compile the blocks of both branches, one graph each, with `torch.compile`'s options."""
        # ModelMixin's would also compile the block within each control block.
        self.transformer.compile_repeated_blocks(*args, **compile_options)
        if self.controlnet.control_blocks:
            self.controlnet.compile_repeated_blocks(*args, **compile_options)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        control_features: torch.Tensor | None = None,
        conditioning_scale: float | torch.Tensor = 1.0,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the velocity of the noisy latents, steered by the control features.

        Args:
            noisy_latents: (B, C, T, h', w'), each of the last three a multiple of the backbone's patch size.
            timesteps: (B,) fp32 in [0, 1000].
            prompt_embeds: (B, L, D_text), any L.
            control_features: (B, F, h, w, Dd), F = 4·(T − 1) + 1; None runs the backbone alone.
            conditioning_scale: factor of the control residuals, or (B,) one per sample; 0 leaves the backbone's output
                unchanged.
            attention_kwargs: the backbone's: {"scale": s} scales its LoRA.
            return_dict: False returns a tuple.

        Returns:
            the output with `sample`, the predicted velocity, like noisy_latents.

        Raises:
            ValueError: if the shapes do not fit, or a switch was set on the backbone alone.
        """
        token_grid = self._token_grid(noisy_latents)
        if isinstance(conditioning_scale, torch.Tensor) and conditioning_scale.shape != noisy_latents.shape[:1]:
            raise ValueError(
                f"conditioning_scale has shape {tuple(conditioning_scale.shape)}: "
                f"expected a float or one per sample, ({noisy_latents.shape[0]},)"
            )
        self._refuse_switches_of_the_backbone()

        control_blocks, control_hidden_states = {}, None
        if control_features is not None:
            control_hidden_states = self.controlnet.control_adapter(control_features, token_grid)  # (B, N, D)
            control_blocks = dict(zip(self.controlnet.config.injection_layers, self.controlnet.control_blocks))
        in_latents = self.controlnet.config.injection == "latent"
        steering = _Steering(
            self._run_block, control_blocks, control_hidden_states, conditioning_scale, in_latents=in_latents
        )
        with _steered(self.transformer.blocks, steering):
            (velocity_pred,) = self.transformer(
                noisy_latents, timesteps, prompt_embeds, return_dict=False, attention_kwargs=attention_kwargs
            )
        velocity_pred = velocity_pred.clone()  # the backbone's output is a view, of which FSDP2 warns
        return Transformer2DModelOutput(sample=velocity_pred) if return_dict else (velocity_pred,)

    def _run_block(self, block, hidden_states, *shared):
        """Return `block(hidden_states, *shared)`, checkpointed if it is part of the autograd graph.

        Before the first residual there is no graph: the backbone is frozen, so its hidden states need no gradient yet.
        """
        if not (self.gradient_checkpointing and hidden_states.requires_grad):
            return block(hidden_states, *shared)
        return self._gradient_checkpointing_func(block, hidden_states, *shared)

    def _token_grid(self, noisy_latents):
        """Return (T, h, w), the grid of the backbone's tokens."""
        patch_size = self.config.patch_size
        if noisy_latents.ndim != 5 or any(size % patch for size, patch in zip(noisy_latents.shape[2:], patch_size)):
            raise ValueError(
                f"noisy latents have shape {tuple(noisy_latents.shape)}: expected (B, C, T, h, w) "
                f"with T, h, w multiples of the patch size {tuple(patch_size)}"
            )
        return tuple(size // patch for size, patch in zip(noisy_latents.shape[2:], patch_size))

    def _refuse_switches_of_the_backbone(self):
        """Refuse what would be wrong without an error: it would act on the blocks without their control."""
        if self.transformer.gradient_checkpointing:
            raise ValueError(
                "gradient checkpointing was enabled on the backbone: call enable_gradient_checkpointing of the joined "
                "model instead"
            )
        hooks = _hooks(self.transformer) | _hooks(self.transformer.blocks[0])
        if _STEERING_HOOK not in hooks and any(hook._is_stateful for hook in hooks.values()):
            raise ValueError("a cache was enabled on the backbone: call enable_cache of the joined model instead")

    # ---------------------------------------------------------------------------------------------------- caches

    @property
    def is_cache_enabled(self) -> bool:
        """True from `enable_cache` to `disable_cache`."""
        return self.transformer.is_cache_enabled

    def enable_cache(self, config: Any) -> None:
        """Reuse results of earlier denoising steps; where a block of the backbone is skipped, so is its control block.

        Each pass of guidance must run in a `cache_context` of its own, as `C2RPipeline`'s passes do.

        Args:
            config: of one of Diffusers' caches.

        Raises:
            ValueError: this cache does not work here, or there is another one.
        """
        name = type(config).__name__
        if isinstance(config, FasterCacheConfig):
            raise ValueError(
                f"{name}: FasterCache needs the passes of guidance in one batch, but here each runs by itself; use "
                "another cache"
            )
        if self.is_cache_enabled:
            self.transformer.enable_cache(config)  # raises
        for index, block in enumerate(self.transformer.blocks):
            # Before the cache's hooks, which then enclose it.
            hook = _SteeringHook(self.transformer.blocks, index)
            HookRegistry.check_if_exists_or_initialize(block).register_hook(hook, _STEERING_HOOK)
        others = self._hooks_of_layers()
        try:
            self.transformer.enable_cache(config)
            hooks = self._hooks_of_layers() - others
            if not hooks:
                raise ValueError(
                    f"{name}: it finds no layer of Wan to act on, so it would change nothing; name layers in its "
                    "config, or use another cache"
                )
        except BaseException:
            self.disable_cache()
            raise
        if isinstance(config, PyramidAttentionBroadcastConfig):
            for hook in hooks:
                hook.states = StateManager(PyramidAttentionBroadcastState)
                hook.state = _StateOfContext(hook.states)
        HookRegistry.check_if_exists_or_initialize(self).invalidate_child_registries_cache()

    def disable_cache(self) -> None:
        """Compute everything in each step again."""
        if self.is_cache_enabled:
            self.transformer.disable_cache()
        registry = HookRegistry.check_if_exists_or_initialize(self)
        registry.remove_hook(_STEERING_HOOK, recurse=True)
        registry.invalidate_child_registries_cache()

    def _hooks_of_layers(self):
        return {hook for part in self.transformer.children() for m in part.modules() for hook in _hooks(m).values()}

    # ---------------------------------------------------------------------------------------------- PEFT adapters

    @property
    def _hf_peft_config_loaded(self):
        return self.transformer._hf_peft_config_loaded

    @property
    def peft_config(self):
        """Configs of the backbone's adapters by name."""
        return self.transformer.peft_config


def _of_the_backbone(name):
    method = getattr(WanTransformer3DModel, name)

    @wraps(method)
    def call(self, *args, **kwargs):
        return getattr(self.transformer, name)(*args, **kwargs)

    return call


for _name, _method in vars(PeftAdapterMixin).items():
    if callable(_method) and not _name.startswith("_"):
        setattr(C2RTransformer, _name, _of_the_backbone(_name))


# --------------------------------------------------------------------------------------------------------- steering


class _Steering:
    """Runs the control blocks of one forward, so that at most one residual is alive."""

    def __init__(self, run_block, control_blocks, control_hidden_states, conditioning_scale, in_latents):
        self.run_block = run_block
        self.control_blocks = control_blocks  # {index of a backbone's block: control block}
        self.control_hidden_states = control_hidden_states  # (B, N, D)
        self.conditioning_scale = conditioning_scale
        self.in_latents = in_latents  # the control enters the patch-embedded latents, not the outputs of blocks

    def run(self, index, block, hidden_states, *shared):
        """Return the hidden states after a block of the backbone and its control block."""
        if index == 0 and self.in_latents and self.control_hidden_states is not None:
            hidden_states = add_residual(hidden_states, self.control_hidden_states, self.conditioning_scale)
        hidden_states = self.run_block(block, hidden_states, *shared)
        return hidden_states if _STEERING_HOOK in _hooks(block) else self.steer(index, hidden_states, *shared)

    def steer(self, index, hidden_states, *shared):
        """Return the hidden states of a block of the backbone plus the residual of its control block, if it has one.

        The control block is given the same further inputs: prompt, modulation and rotary embedding.
        """
        if index not in self.control_blocks:
            return hidden_states
        self.control_hidden_states, residual = self.run_block(
            self.control_blocks[index], self.control_hidden_states, *shared
        )
        return add_residual(hidden_states, residual, self.conditioning_scale)


class _SteeredBlocks(nn.ModuleList):
    """The backbone's blocks in a forward of the joined model, where an iteration gives functions that steer them."""

    steering: _Steering

    def __iter__(self) -> Iterator[Any]:
        return (partial(self.steering.run, index, block) for index, block in enumerate(super().__iter__()))


@contextmanager
def _steered(blocks: nn.ModuleList, steering: _Steering) -> Iterator[None]:
    # The modules of the tree stay, with their names, hooks and shards: it is only iterated in another way.
    kind = type(blocks)
    blocks.__class__, blocks.steering = _SteeredBlocks, steering  # type: ignore[assignment]
    try:
        yield
    finally:
        blocks.__class__ = kind
        del blocks.steering


class _SteeringHook(ModelHook):
    """Runs the control block within the forward of a block, so that a cache around it keeps and skips both."""

    def __init__(self, blocks, index):
        super().__init__()
        self.blocks, self.index = blocks, index

    def new_forward(self, module, hidden_states, *shared):
        hidden_states = self.fn_ref.original_forward(hidden_states, *shared)
        steering = getattr(self.blocks, "steering", None)  # None: the backbone runs by itself
        return hidden_states if steering is None else steering.steer(self.index, hidden_states, *shared)


class _StateOfContext:
    """The state of the current `cache_context`, in place of Diffusers' one state for all passes of guidance."""

    def __init__(self, states: StateManager):
        object.__setattr__(self, "states", states)

    def __getattr__(self, name):
        return getattr(self.states.get_state(), name)

    def __setattr__(self, name, value):
        setattr(self.states.get_state(), name, value)

    def reset(self):
        self.states.reset()


def _hooks(module):
    """Return Diffusers' hooks of a module by name."""
    registry = getattr(module, "_diffusers_hook", None)
    return {} if registry is None else registry.hooks


def add_residual(
    hidden_states: torch.Tensor, residual: torch.Tensor, conditioning_scale: float | torch.Tensor
) -> torch.Tensor:
    """Return hidden_states + conditioning_scale · residual.

    Args:
        hidden_states, residual: (B, N, D).
        conditioning_scale: one factor for all, or (B,) one per sample.

    Returns:
        (B, N, D) in hidden_states' dtype, also where the scales are fp32 and the states half precision.
    """
    if isinstance(conditioning_scale, torch.Tensor):
        conditioning_scale = conditioning_scale.view(-1, 1, 1)
    return hidden_states + (conditioning_scale * residual).type_as(hidden_states)
