"""Adversarial loss: a small classifier tells CG from real, and its reversed gradient makes CG samples look real."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from typing_extensions import TypedDict

from c2r import flow_matching
from c2r.models.hub import Count
from c2r.models.transformer import C2RTransformer

SIGMA_EMBEDDING_DIM = 32

# Factor of the gradients of the classifier's own weights. It makes no difference to AdamW, but it does to clipping by
# the norm of all gradients: the classifier's, about ten times those of the control branch, would dominate that norm
# and slow the control branch down.
OWN_GRADIENT_SCALE = 0.01


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, scale):
        ctx.save_for_backward(scale)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx, gradient):
        (scale,) = ctx.saved_tensors
        return scale.view(-1, *[1] * (gradient.ndim - 1)) * gradient, None


def scale_gradient(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the tensor unchanged; multiply its gradient in the backward pass.

    Args:
        tensor: (B, ...), any float dtype.
        scale: (B,) factor of each sample's gradient.

    Returns:
        Like `tensor`.
    """
    return _ScaleGradient.apply(tensor, scale.to(tensor.dtype))


class _UnitConv3d(nn.Conv3d):
    """A convolution whose kernel is normalised to norm 1 for each output channel.

    This bounds the slope of the classifier. With free weights the slope keeps growing where the domains are easy to
    tell apart: the reversed gradient then has spikes ten times as large as the velocity's gradient, and AdamW's steps
    shrink accordingly.
    """

    def forward(self, hidden_states):
        return self._conv_forward(hidden_states, F.normalize(self.weight.flatten(1)).view_as(self.weight), self.bias)


# SiLU that keeps unit variance. Source: Karras et al. 2024 (EDM2), eq. 81
def _unit_silu(hidden_states):
    return F.silu(hidden_states) / 0.596


class DomainClassifierConfig(TypedDict):
    """The checked entries of a `DomainClassifier`'s config.json."""

    in_channels: Count
    width: Count


class DomainClassifier(ModelMixin, ConfigMixin):
    """Classifies predicted clean latents as coming from a CG sample or a real one.

    Three strided convolutions see windows of 15×15×7 latents: texture and light, not the layout of a scene. No layer
    normalises over a sample, which would hide how flat its textures are.

    Args:
        in_channels: C of the latents.
        width: channels of the first convolution.
    """

    @register_to_config
    def __init__(self, in_channels: int = 16, width: int = 32):
        super().__init__()
        channels = (in_channels, width, 2 * width, 2 * width)
        self.convolutions = nn.ModuleList(
            _UnitConv3d(before, after, kernel_size=3, stride=(1, 2, 2), padding=1)
            for before, after in pairwise(channels)
        )
        self.sigma_modulation = nn.Linear(SIGMA_EMBEDDING_DIM, 2 * width)
        self.head = _UnitConv3d(channels[-1], 1, kernel_size=1)

    # R(x) = x, dR/dx = −λ·I. Source: Ganin & Lempitsky 2015
    def forward(self, latents: torch.Tensor, sigmas: torch.Tensor, reversal_strength: torch.Tensor) -> torch.Tensor:
        """Return one logit per sample: above 0 the latents look more like CG than like real video.

        Args:
            latents: (B, C, T, h, w), predicted clean latents of any size.
            sigmas: (B,) fp32 in [0, 1], the noise levels at which the latents were predicted.
            reversal_strength: (B,) λ ≥ 0 of each sample: the latents' gradient is multiplied by −λ.

        Returns:
            (B,) in the classifier's dtype, also under autocast.
        """
        latents = scale_gradient(latents, -reversal_strength / OWN_GRADIENT_SCALE)
        with torch.autocast(latents.device.type, enabled=False):
            dtype = self.head.weight.dtype
            embedding = get_timestep_embedding(1000 * sigmas, SIGMA_EMBEDDING_DIM).to(dtype)
            scale, shift = self.sigma_modulation(embedding)[:, :, None, None, None].chunk(2, dim=1)  # (B, width, …)
            first, *later = self.convolutions
            hidden_states = _unit_silu(first(latents.to(dtype)) * (1 + scale) + shift)  # (B, width, T, h/2, w/2)
            for convolution in later:
                hidden_states = _unit_silu(convolution(hidden_states))
            domain_logits = self.head(hidden_states.mean((2, 3, 4), keepdim=True)).flatten()
        return scale_gradient(domain_logits, torch.full_like(domain_logits, OWN_GRADIENT_SCALE))


@dataclass
class AdversaryOutput(Transformer2DModelOutput):
    """Output of `WithAdversary`: `sample`, the predicted velocity, and `domain_logits`.

    The logits are (B,), above 0 for CG, or None if the classifier was left out.
    """

    domain_logits: torch.Tensor | None = None


class WithAdversary(nn.Module):
    """The joined model together with the domain classifier of its output, as one module for training engines.

    Args:
        model: backbone and control branch.
        domain_classifier: classifier for the backbone's output channels.
    """

    def __init__(self, model: C2RTransformer, domain_classifier: DomainClassifier):
        super().__init__()
        self.model = model
        self._no_split_modules = model._no_split_modules
        self.domain_classifier = domain_classifier

    @property
    def transformer(self):
        """The backbone."""
        return self.model.transformer

    @property
    def controlnet(self):
        """The control branch."""
        return self.model.controlnet

    @property
    def config(self):
        """The backbone's config."""
        return self.model.config

    @property
    def dtype(self) -> torch.dtype:
        """The backbone's dtype."""
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        """The backbone's device."""
        return self.model.device

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that phase 2 optimizes, the classifier's last."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def enable_gradient_checkpointing(self, gradient_checkpointing_func: Callable[..., Any] | None = None):
        """See `C2RTransformer.enable_gradient_checkpointing`."""
        self.model.enable_gradient_checkpointing(gradient_checkpointing_func)

    def disable_gradient_checkpointing(self):
        """See `C2RTransformer.disable_gradient_checkpointing`."""
        self.model.disable_gradient_checkpointing()

    def compile_repeated_blocks(self, **compile_options):
        """See `C2RTransformer.compile_repeated_blocks`."""
        self.model.compile_repeated_blocks(**compile_options)

    def cache_context(self, name: str, **place: Any):
        """See Diffusers' `CacheMixin.cache_context`."""
        return self.model.cache_context(name, **place)

    def forward(
        self,
        noisy_latents: torch.Tensor,
        timesteps: torch.Tensor,
        prompt_embeds: torch.Tensor,
        control_features: torch.Tensor | None = None,
        conditioning_scale: float | torch.Tensor = 1.0,
        reversal_strength: torch.Tensor | None = None,
    ) -> AdversaryOutput:
        """Predict the velocity, and classify the clean latents that the velocity leads to.

        Args:
            noisy_latents, timesteps, prompt_embeds, control_features, conditioning_scale: see `C2RTransformer`.
            reversal_strength: see `DomainClassifier`; None leaves the classifier out.
        """
        velocity_pred = self.model(
            noisy_latents, timesteps, prompt_embeds, control_features, conditioning_scale
        ).sample
        if reversal_strength is None:
            return AdversaryOutput(sample=velocity_pred)
        sigmas = timesteps / 1000
        latents = flow_matching.predict_latents(noisy_latents, velocity_pred, sigmas)
        return AdversaryOutput(
            sample=velocity_pred, domain_logits=self.domain_classifier(latents, sigmas, reversal_strength)
        )


def takes_control(transformer) -> bool:
    """Return True if a model has a control branch: its forward then takes control features and their scale."""
    return isinstance(transformer, (C2RTransformer, WithAdversary))


def domain_loss(
    domain_logits: torch.Tensor, domains: torch.Tensor, counted: torch.Tensor, cg_ratio: float
) -> torch.Tensor:
    """Cross entropy of the classifier, with equal total weight for the two domains.

    Args:
        domain_logits: (B,), `DomainClassifier`'s.
        domains: (B,) 0 real, 1 CG.
        counted: (B,) bool, True for samples that count.
        cg_ratio: share of CG samples among those drawn at present, in [0, 1].

    Returns:
        (B,) at least fp32, 0 for samples that do not count. Random guessing gives ln 2 on average.
    """
    # w = 1 / (2·share): each domain has half of the weight. Clamped, because batches in flight may still hold a domain
    # that is no longer drawn.
    # Filled on the device: a tensor of Python numbers would be copied there, and the host would wait for the copy.
    shares = torch.full(domains.shape, max(1 - cg_ratio, 0.01), device=domains.device)
    shares = shares.masked_fill(domains == 1, max(cg_ratio, 0.01))
    entropy = F.binary_cross_entropy_with_logits(domain_logits, domains.to(domain_logits.dtype), reduction="none")
    return counted * entropy / (2 * shares)
