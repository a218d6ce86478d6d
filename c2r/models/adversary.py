"""`--adversarial_weight`: a small classifier tells CG from real, and the reversed gradient has CG look like real."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

SIGMA_EMBEDDING_DIM = 32

# AdamW does not see the scale of a gradient, but clipping is by the norm of all gradients together: the classifier's
# own, some ten times those of the control branch, would slow that down.
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


def scale_gradient(tensor, scale):
    """The tensor as it is; its gradient is multiplied on the way back.

    Args:
        tensor: (B, ...), any float dtype.
        scale: (B,) factor of each sample's gradient.

    Returns:
        Like `tensor`.
    """
    return _ScaleGradient.apply(tensor, scale.to(tensor.dtype))


class _UnitConv3d(nn.Conv3d):
    """A convolution whose kernel has norm 1 for each output channel, however its weights grow.

    So the slope of the classifier is bounded. Without, it gets ever steeper where the domains are easy to tell apart,
    the reversed gradient has spikes ten times as large as the velocity's gradient, and AdamW takes steps as small as
    these demand.
    """

    def forward(self, hidden_states):
        return self._conv_forward(hidden_states, F.normalize(self.weight.flatten(1)).view_as(self.weight), self.bias)


# SiLU that keeps unit variance. Source: Karras et al. 2024 (EDM2), eq. 81
def _unit_silu(hidden_states):
    return F.silu(hidden_states) / 0.596


class DomainClassifier(ModelMixin, ConfigMixin):
    """Says of predicted clean latents whether they come from a CG sample or a real one.

    Three strided convolutions see windows of 15×15×7 latents: texture and light, not the plan of a scene. There is no
    normalisation over a sample, which would hide how flat it is.

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
    def forward(self, latents, sigmas, reversal_strength):
        """Logits of CG: above 0 the latents look more like CG than like real video.

        Args:
            latents: (B, C, T, h, w), predicted clean latents of any size.
            sigmas: (B,) fp32 in [0, 1], the noise levels they were predicted at.
            reversal_strength: (B,) λ of each sample, at least 0: the latents' gradient is −λ times what it would be.

        Returns:
            (B,) in the classifier's dtype, whatever autocast asks for.
        """
        latents = scale_gradient(latents, -reversal_strength / OWN_GRADIENT_SCALE)
        with torch.autocast(latents.device.type, enabled=False):
            dtype = self.head.weight.dtype
            embedding = get_timestep_embedding(1000 * sigmas, SIGMA_EMBEDDING_DIM).to(dtype)
            scale, shift = self.sigma_modulation(embedding)[:, :, None, None, None].chunk(2, dim=1)  # (B, width, …)
            first, *others = self.convolutions
            hidden_states = _unit_silu(first(latents.to(dtype)) * (1 + scale) + shift)  # (B, width, T, h/2, w/2)
            for convolution in others:
                hidden_states = _unit_silu(convolution(hidden_states))
            domain_logits = self.head(hidden_states.mean((2, 3, 4), keepdim=True)).flatten()
        return scale_gradient(domain_logits, torch.full_like(domain_logits, OWN_GRADIENT_SCALE))


def domain_loss(domain_logits, domains, counted, cg_ratio):
    """Cross entropy of the classifier, the two domains at equal weight however rare one is.

    Args:
        domain_logits: (B,), `DomainClassifier`'s.
        domains: (B,) 0 real, 1 CG.
        counted: (B,) bool, which samples are to be told apart.
        cg_ratio: share of CG samples among those that are drawn now, in [0, 1].

    Returns:
        (B,) at least fp32, 0 where a sample does not count. A classifier that knows nothing has ln 2 on average.
    """
    # w = 1 / (2·share): each domain has half of the weight. Batches in flight may hold what is no longer drawn.
    shares = torch.tensor([1 - cg_ratio, cg_ratio], device=domains.device).clamp(min=0.01)
    entropy = F.binary_cross_entropy_with_logits(domain_logits, domains.to(domain_logits.dtype), reduction="none")
    return counted * entropy / (2 * shares[domains])
