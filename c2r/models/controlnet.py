"""The trainable control branch: adapter, cloned transformer blocks, projectors that start at zero."""

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from c2r import InputError
from c2r.models.control_adapter import ControlAdapter

#: What the control blocks have in common with the backbone's blocks, by WanTransformer3DModel's config.
SHARED_CONFIG = (
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "qk_norm",
    "eps",
)


def injection_layers(control_layers, control_stride, num_layers):
    """The backbone blocks after which a control residual is added: 0, stride, 2·stride, …

    Args:
        control_layers: number of control blocks, at least 1.
        control_stride: backbone blocks per control block, at least 1. 1 is the first `control_layers` blocks.
        num_layers: number of the backbone's blocks.

    Returns:
        list of `control_layers` ascending indices below `num_layers`.

    Raises:
        InputError: if they do not fit.
    """
    options = f"--control_layers {control_layers} --control_stride {control_stride}"
    if control_layers < 1 or control_stride < 1:
        raise InputError(f"{options}: both must be at least 1")
    last = (control_layers - 1) * control_stride
    if last >= num_layers:
        raise InputError(
            f"{options}: the last residual would follow block {last}, but the backbone has blocks 0 to "
            f"{num_layers - 1}; lower one of the two"
        )
    return list(range(0, last + 1, control_stride))


class C2RControlBlock(nn.Module):
    """One block of the control branch and its projector: the unit that is checkpointed, compiled and sharded."""

    def __init__(self, dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps):
        super().__init__()
        self.block = WanTransformerBlock(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.reset_projector()

    def reset_projector(self):
        """Make the residual zero: training starts from the backbone as it is."""
        self.projector[0].reset_parameters()
        nn.init.zeros_(self.projector[2].weight)
        nn.init.zeros_(self.projector[2].bias)

    def forward(self, control_hidden_states, prompt_hidden_states, modulation, rotary_emb):
        """
        Args:
            control_hidden_states: (B, N, D), the adapter's or the previous control block's output.
            prompt_hidden_states, modulation, rotary_emb: (B, L, D), (B, 6, D) and a pair of (1, N, 1, head_dim): the
                backbone's own, shared.

        Returns:
            control_hidden_states (B, N, D) for the next control block, control_residual (B, N, D).
        """
        control_hidden_states = self.block(control_hidden_states, prompt_hidden_states, modulation, rotary_emb)
        return control_hidden_states, self.projector(control_hidden_states)


class C2RControlNet(ModelMixin, ConfigMixin):
    """The control branch. It has no forward of its own: `C2RTransformer` runs its blocks between the backbone's.

    Args:
        injection_layers: ascending indices of the backbone blocks after which a residual is added, one per control
            block; from `injection_layers()`.
        num_attention_heads, attention_head_dim, ffn_dim, num_layers, cross_attn_norm, qk_norm, eps: the backbone's.
        feature_dim: Dd, DINOv3's width.
        temporal_stride: pixel frames per latent frame of the VAE.

    Raises:
        ValueError: if `injection_layers` are not ascending indices of backbone blocks.
    """

    # As in the backbone: what `from_pretrained(torch_dtype=torch.bfloat16)` leaves in fp32.
    _keep_in_fp32_modules = ["scale_shift_table", "norm", "norm1", "norm2", "norm3"]  # noqa: RUF012
    _no_split_modules = ["C2RControlBlock", "ControlAdapter"]  # noqa: RUF012
    _repeated_blocks = ["C2RControlBlock"]  # noqa: RUF012

    @register_to_config
    def __init__(
        self,
        injection_layers: list[int],
        num_attention_heads: int,
        attention_head_dim: int,
        ffn_dim: int,
        num_layers: int,
        cross_attn_norm: bool = True,
        qk_norm: str = "rms_norm_across_heads",
        eps: float = 1e-6,
        feature_dim: int = 768,
        temporal_stride: int = 4,
    ):
        super().__init__()
        if injection_layers != sorted(set(injection_layers)) or not set(injection_layers) <= set(range(num_layers)):
            raise ValueError(f"injection_layers are {injection_layers}: not ascending indices below {num_layers}")
        dim = num_attention_heads * attention_head_dim
        self.control_adapter = ControlAdapter(feature_dim, dim, temporal_stride)
        self.control_blocks = nn.ModuleList(
            C2RControlBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in injection_layers
        )

    @classmethod
    def from_transformer(
        cls, transformer, control_layers=15, control_stride=1, feature_dim=768, temporal_stride=4, empty=False
    ):
        """A fresh control branch for this backbone: its first blocks cloned with their weights, zero residuals.

        Args:
            transformer: `WanTransformer3DModel` (text to video), any dtype.
            control_layers, control_stride: see `injection_layers`.
            feature_dim: Dd, DINOv3's width.
            temporal_stride: pixel frames per latent frame of the VAE.
            empty: leave all values undefined; see `load_transformer`.

        Returns:
            C2RControlNet in fp32, to be trained, on the backbone's device. The adapter and the projectors' first
            layers are drawn from torch's global generator.

        Raises:
            InputError: if control_layers and control_stride do not fit the backbone.
        """
        layers = injection_layers(control_layers, control_stride, transformer.config.num_layers)
        shared = {name: transformer.config[name] for name in SHARED_CONFIG}
        # By keyword: diffusers takes what is given by position for a default, and drops it in `from_config`.
        options = {"injection_layers": layers, "feature_dim": feature_dim, "temporal_stride": temporal_stride}
        with torch.device("meta"):  # the clones need no random weights first: at 14B they are 5 billion
            controlnet = cls(**options, **shared)
        controlnet.to_empty(device=transformer.device)
        if empty:
            return controlnet
        controlnet.control_adapter.reset_parameters()
        for control_block, block in zip(controlnet.control_blocks, transformer.blocks):
            control_block.block.load_state_dict(block.state_dict())
            control_block.reset_projector()
        return controlnet
