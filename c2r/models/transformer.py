"""Backbone and control branch in one forward."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from einops import rearrange
from torch import nn

from c2r.models.checkpointing import run_checkpointed
from c2r.models.controlnet import SHARED_CONFIG, C2RControlNet


class C2RTransformer(nn.Module):
    """The frozen Wan backbone with a trainable control branch, as one module that any training engine can wrap.

    For engines that shard: submodules are always called as modules, so their hooks run. Wrap `C2RControlBlock`,
    `WanTransformerBlock` and the outermost module, not `transformer` or `controlnet`: these two are never called as a
    whole, so a hook on them would not run.

    Args:
        transformer: text-to-video backbone. It is frozen here.
        controlnet: control branch made for a backbone of this shape.

    Raises:
        ValueError: if the two do not fit each other.
    """

    _no_split_modules = ("WanTransformerBlock", "C2RControlBlock")

    def __init__(self, transformer: WanTransformer3DModel, controlnet: C2RControlNet):
        super().__init__()
        for name in SHARED_CONFIG:
            backbone, control = transformer.config[name], controlnet.config[name]
            if backbone != control:
                raise ValueError(f"the ControlNet is for a backbone with {name} {control}, this one has {backbone}")
        self.transformer = transformer.requires_grad_(False).eval()
        self.controlnet = controlnet
        self.gradient_checkpointing = False
        self._checkpointing_func: Callable[..., Any] = run_checkpointed

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

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] = run_checkpointed):
        """Keep one input per block for the backward pass and recompute the rest.

        Args:
            gradient_checkpointing_func: a partial of `run_checkpointed`, called with a block and its inputs.
        """
        self.gradient_checkpointing = True
        self._checkpointing_func = gradient_checkpointing_func

    def disable_gradient_checkpointing(self):
        """Keep all activations for the backward pass."""
        self.gradient_checkpointing = False

    def compile_repeated_blocks(self, **compile_options):
        """Compile the blocks of both branches, one graph each, with `torch.compile`'s options."""
        self.transformer.compile_repeated_blocks(**compile_options)
        self.controlnet.compile_repeated_blocks(**compile_options)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        control_features: torch.Tensor | None = None,
        conditioning_scale: float | torch.Tensor = 1.0,
    ) -> Transformer2DModelOutput:
        """Predict the velocity of the noisy latents, steered by the control features.

        Args:
            noisy_latents: (B, C, T, h', w'), each of the last three a multiple of the backbone's patch size.
            timesteps: (B,) fp32 in [0, 1000].
            prompt_embeds: (B, L, D_text), any L.
            control_features: (B, F, h, w, Dd), F = 4·(T − 1) + 1; None runs the backbone alone.
            conditioning_scale: factor of the control residuals, or (B,) one per sample; 0 leaves the backbone's output
                unchanged.

        Returns:
            the output with `sample`, the predicted velocity, like noisy_latents.

        Raises:
            ValueError: if the shapes do not fit.
        """
        backbone = self.transformer
        token_grid = self._token_grid(noisy_latents)
        if isinstance(conditioning_scale, torch.Tensor) and conditioning_scale.shape != noisy_latents.shape[:1]:
            raise ValueError(
                f"conditioning_scale has shape {tuple(conditioning_scale.shape)}: "
                f"expected a float or one per sample, ({noisy_latents.shape[0]},)"
            )

        rotary_emb = backbone.rope(noisy_latents)  # cos, sin: (1, N, 1, head_dim)
        hidden_states = backbone.patch_embedding(noisy_latents)  # (B, D, T, h, w)
        hidden_states = rearrange(hidden_states, "b d t h w -> b (t h w) d").contiguous()  # (B, N, D)
        time_embedding, modulation, prompt_hidden_states, _ = backbone.condition_embedder(
            timesteps, prompt_embeds, None
        )  # (B, D), (B, 6·D), (B, L, D)
        modulation = rearrange(modulation, "b (six d) -> b six d", six=6)
        shared = (prompt_hidden_states, modulation, rotary_emb)  # inputs of all blocks of both branches

        control_blocks = {}
        if control_features is not None:
            control_hidden_states = self.controlnet.control_adapter(control_features, token_grid)  # (B, N, D)
            control_blocks = dict(zip(self.controlnet.config.injection_layers, self.controlnet.control_blocks))

        # Each control block runs right after the block it steers, so at most one residual is alive.
        for index, block in enumerate(backbone.blocks):
            hidden_states = self._run_block(block, hidden_states, *shared)
            if index in control_blocks:
                control_hidden_states, residual = self._run_block(
                    control_blocks[index], control_hidden_states, *shared
                )
                hidden_states = add_residual(hidden_states, residual, conditioning_scale)

        # The one parameter that is used outside its own module's forward. ZeRO-3 gathers it on access (and never
        # shards one so small), and FSDP2 holds it in the outermost module's group, which is whole during this forward.
        shift, scale = (backbone.scale_shift_table + time_embedding.unsqueeze(1)).unbind(1)  # (B, D) each
        normed = backbone.norm_out(hidden_states.float())
        hidden_states = (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).type_as(hidden_states)
        velocity_pred = self._unpatchify(backbone.proj_out(hidden_states), token_grid)
        return Transformer2DModelOutput(sample=velocity_pred)

    def _run_block(self, block, hidden_states, *shared):
        """Return `block(hidden_states, *shared)`, checkpointed if it is part of the autograd graph.

        Before the first residual there is no graph: the backbone is frozen, so its hidden states need no gradient yet.
        """
        if not (self.gradient_checkpointing and hidden_states.requires_grad):
            return block(hidden_states, *shared)
        return self._checkpointing_func(block, hidden_states, *shared)

    def _token_grid(self, noisy_latents):
        """Return (T, h, w), the grid of the backbone's tokens."""
        patch_size = self.config.patch_size
        if noisy_latents.ndim != 5 or any(size % patch for size, patch in zip(noisy_latents.shape[2:], patch_size)):
            raise ValueError(
                f"noisy latents have shape {tuple(noisy_latents.shape)}: expected (B, C, T, h, w) "
                f"with T, h, w multiples of the patch size {tuple(patch_size)}"
            )
        return tuple(size // patch for size, patch in zip(noisy_latents.shape[2:], patch_size))

    def _unpatchify(self, patches, token_grid):
        """Put patches (B, N, pt·ph·pw·C) in their places: (B, C, T·pt, h·ph, w·pw)."""
        (t, h, w), (pt, ph, pw) = token_grid, self.config.patch_size
        return rearrange(
            patches, "b (t h w) (pt ph pw c) -> b c (t pt) (h ph) (w pw)", t=t, h=h, w=w, pt=pt, ph=ph, pw=pw
        )


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
