"""Backbone and control branch in one forward."""

import math

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from c2r import flow_matching
from c2r.models.controlnet import SHARED_CONFIG


class C2RTransformer(nn.Module):
    """The frozen Wan backbone with a trainable control branch, as one module that any training engine can wrap.

    For engines that shard: submodules are always called as modules, so their hooks run. Wrap `C2RControlBlock`,
    `WanTransformerBlock` and this module, not `transformer` or `controlnet`: their own forward is never called, and a
    hook on it would not run.

    Args:
        transformer: `WanTransformer3DModel`, text to video. It is frozen here.
        controlnet: `C2RControlNet` made for this backbone's shape.
        domain_classifier: `DomainClassifier` of its output, for `--adversarial_weight`; None trains without.

    Raises:
        ValueError: if the two do not fit each other.
    """

    _no_split_modules = ("WanTransformerBlock", "C2RControlBlock")

    def __init__(self, transformer, controlnet, domain_classifier=None):
        super().__init__()
        for name in SHARED_CONFIG:
            backbone, control = transformer.config[name], controlnet.config[name]
            if backbone != control:
                raise ValueError(f"the ControlNet is for a backbone with {name} {control}, this one has {backbone}")
        self.transformer = transformer.requires_grad_(False).eval()
        self.controlnet = controlnet
        self.domain_classifier = domain_classifier
        self.gradient_checkpointing = False

    @property
    def config(self):
        """The backbone's config."""
        return self.transformer.config

    @property
    def dtype(self):
        return self.transformer.dtype

    @property
    def device(self):
        return self.transformer.device

    def train(self, mode=True):
        """Training mode for all but the backbone."""
        super().train(mode)
        self.transformer.eval()
        return self

    def trainable_parameters(self):
        """The parameters an optimizer of phase 2 gets."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self):
        """Keep one input per block for the backward pass and compute the rest again."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self):
        self.gradient_checkpointing = False

    def compile_repeated_blocks(self, **compile_options):
        """Compile the blocks of both branches, one graph each, with `torch.compile`'s options."""
        self.transformer.compile_repeated_blocks(**compile_options)
        self.controlnet.compile_repeated_blocks(**compile_options)

    def forward(
        self,
        noisy_latents,
        timesteps,
        prompt_embeds,
        control_features=None,
        conditioning_scale=1.0,
        reversal_strength=None,
    ):
        """Velocity of the noisy latents, steered by the control features.

        Args:
            noisy_latents: (B, C, T, h', w'), each of the last three a multiple of the backbone's patch size.
            timesteps: (B,) fp32 in [0, 1000].
            prompt_embeds: (B, L, D_text), any L.
            control_features: (B, F, h, w, Dd), F = 4·(T − 1) + 1; None is the backbone alone.
            conditioning_scale: float, or (B,) tensor, one per sample; 0 leaves the backbone's output unchanged.
            reversal_strength: (B,) tensor: also have the domain classifier look at the predicted clean latents, and
                multiply the gradient that comes back from it by −reversal_strength.

        Returns:
            velocity_pred, like noisy_latents; with reversal_strength a tuple of it and domain_logits (B,).

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
        hidden_states = hidden_states.flatten(2).transpose(1, 2).contiguous()  # (B, N, D)
        time_embedding, modulation, prompt_hidden_states, _ = backbone.condition_embedder(
            timesteps, prompt_embeds, None
        )  # (B, D), (B, 6·D), (B, L, D)
        shared = (prompt_hidden_states, modulation.unflatten(1, (6, -1)), rotary_emb)  # modulation (B, 6, D)

        control_blocks = {}
        if control_features is not None:
            control_hidden_states = self.controlnet.control_adapter(control_features, token_grid)  # (B, N, D)
            control_blocks = dict(zip(self.controlnet.config.injection_layers, self.controlnet.control_blocks))

        # Each control block runs right after the block it steers, so at most one residual is alive.
        for index, block in enumerate(backbone.blocks):
            hidden_states = self._run(block, hidden_states, *shared)
            if index in control_blocks:
                control_hidden_states, residual = self._run(control_blocks[index], control_hidden_states, *shared)
                hidden_states = add_residual(hidden_states, residual, conditioning_scale)

        # The one parameter that is used outside its own module's forward. ZeRO-3 gathers it on access (and never
        # shards one so small), FSDP2 holds it in this module's group; both need it read here, in this forward.
        shift, scale = (backbone.scale_shift_table + time_embedding.unsqueeze(1)).unbind(1)  # (B, D) each
        normed = backbone.norm_out(hidden_states.float())
        hidden_states = (normed * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)).type_as(hidden_states)
        velocity_pred = self._unpatchify(backbone.proj_out(hidden_states), token_grid)
        if reversal_strength is None:
            return velocity_pred
        sigmas = timesteps / 1000
        latents = flow_matching.predict_latents(noisy_latents, velocity_pred, sigmas)
        return velocity_pred, self.domain_classifier(latents, sigmas, reversal_strength)

    def _run(self, block, hidden_states, *shared):
        """`block(hidden_states, *shared)`, checkpointed where there is a graph.

        Before the first residual there is none: the backbone is frozen, so its hidden states need no gradient yet.
        """
        if not (self.gradient_checkpointing and hidden_states.requires_grad):
            return block(hidden_states, *shared)
        # No random numbers are drawn in a block (Wan's dropout is 0), so there is no RNG state to keep.
        return checkpoint(block, hidden_states, *shared, use_reentrant=False, preserve_rng_state=False)

    def _token_grid(self, noisy_latents):
        """(T, h, w) of the backbone's tokens."""
        patch_size = self.config.patch_size
        if noisy_latents.ndim != 5 or any(size % patch for size, patch in zip(noisy_latents.shape[2:], patch_size)):
            raise ValueError(
                f"noisy latents have shape {tuple(noisy_latents.shape)}: expected (B, C, T, h, w) "
                f"with T, h, w multiples of the patch size {tuple(patch_size)}"
            )
        return tuple(size // patch for size, patch in zip(noisy_latents.shape[2:], patch_size))

    def _unpatchify(self, patches, token_grid):
        """(B, N, pt·ph·pw·C) -> (B, C, T·pt, h·ph, w·pw)."""
        patch_size = self.config.patch_size
        channels = patches.shape[-1] // math.prod(patch_size)
        latents = patches.unflatten(2, (*patch_size, channels)).unflatten(1, token_grid)  # (B, T, h, w, pt, ph, pw, C)
        latents = latents.permute(0, 7, 1, 4, 2, 5, 3, 6)  # (B, C, T, pt, h, ph, w, pw)
        return latents.flatten(6, 7).flatten(4, 5).flatten(2, 3)


def add_residual(hidden_states, residual, conditioning_scale):
    """hidden_states + conditioning_scale · residual.

    Args:
        hidden_states, residual: (B, N, D).
        conditioning_scale: float, or (B,) tensor.

    Returns:
        (B, N, D) in hidden_states' dtype, also with fp32 scales and half-precision states.
    """
    if isinstance(conditioning_scale, torch.Tensor):
        conditioning_scale = conditioning_scale.view(-1, 1, 1)
    return hidden_states + (conditioning_scale * residual).type_as(hidden_states)
