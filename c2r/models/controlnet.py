"""The trainable control branch: adapter, cloned transformer blocks, projectors that start at zero."""

from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin, WanTransformer3DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models._modeling_parallel import ContextParallelInput
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from c2r import InputError
from c2r.models.control_adapter import ControlAdapter
from c2r.models.control_projection import ControlProjection, FittedProjection, ProjectedControlAdapter
from c2r.models.gguf_weights import whole_state_dict
from c2r.models.injections import INJECTIONS

#: Entries of WanTransformer3DModel's config that control blocks share with the backbone's blocks.
SHARED_CONFIG = (
    "num_attention_heads",
    "attention_head_dim",
    "ffn_dim",
    "num_layers",
    "cross_attn_norm",
    "qk_norm",
    "eps",
)


def injection_layers(control_layers: int, control_stride: int, num_layers: int) -> list[int]:
    """Return the indices of the backbone blocks after which a control residual is added: 0, stride, 2·stride, …

    Args:
        control_layers: number of control blocks, at least 1.
        control_stride: backbone blocks per control block, at least 1. With 1 the residuals follow the first
            `control_layers` blocks.
        num_layers: number of the backbone's blocks.

    Raises:
        InputError: if the backbone has too few blocks.
    """
    options = f"--control_layers {control_layers} --control_stride {control_stride}"
    if control_layers < 1 or control_stride < 1:
        raise InputError(f"{options}: both must be at least 1; raise the lower one")
    last = (control_layers - 1) * control_stride
    if last >= num_layers:
        raise InputError(
            f"{options}: the last residual would follow block {last}, but the backbone has blocks 0 to "
            f"{num_layers - 1}; lower one of the two options"
        )
    return list(range(0, last + 1, control_stride))


def layers_of(injection: str, control_layers: int, control_stride: int, num_layers: int) -> list[int]:
    """Return `injection_layers` for injection "blocks", none for "latent"."""
    return [] if injection == "latent" else injection_layers(control_layers, control_stride, num_layers)


class C2RControlBlock(nn.Module):
    """One block of the control branch and its projector: the unit that is checkpointed, compiled and sharded."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, qk_norm: str, cross_attn_norm: bool, eps: float):
        super().__init__()
        self.block = WanTransformerBlock(dim, ffn_dim, num_heads, qk_norm, cross_attn_norm, eps)
        self.projector = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
        self.reset_projector()

    def reset_projector(self):
        """Make the residual zero, so that training starts from the backbone's own output."""
        self.projector[0].reset_parameters()
        nn.init.zeros_(self.projector[2].weight)
        nn.init.zeros_(self.projector[2].bias)

    def forward(
        self,
        control_hidden_states: torch.Tensor,
        prompt_hidden_states: torch.Tensor,
        modulation: torch.Tensor,
        rotary_emb: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the block, and compute the residual that it adds to the backbone.

        Args:
            control_hidden_states: (B, N, D), the adapter's or the previous control block's output.
            prompt_hidden_states, modulation, rotary_emb: (B, L, D), (B, 6, D) and two (1, N, 1, head_dim), shared with
                the backbone's blocks.

        Returns:
            control_hidden_states (B, N, D) for the next control block, control_residual (B, N, D).
        """
        control_hidden_states = self.block(control_hidden_states, prompt_hidden_states, modulation, rotary_emb)
        return control_hidden_states, self.projector(control_hidden_states)


class C2RControlNet(ModelMixin, ConfigMixin):
    """The control branch. It has no forward: `C2RTransformer` runs its parts between the backbone's.

    Args:
        injection_layers: result of `injection_layers()`, one entry per control block; empty with injection "latent".
        num_attention_heads, attention_head_dim, ffn_dim, num_layers, cross_attn_norm, qk_norm, eps: the backbone's.
        feature_dim: Dd, DINOv3's width.
        temporal_stride: pixel frames per latent frame of the VAE.
        injection: "blocks", or "latent" as in the released C2R: no control blocks, the adapter's tokens times its gate
            are added once to the patch-embedded latents.
        causal_control: see `ControlAdapter`.
        control_directions: K, the adapter sees the features projected on K directions, see `ControlProjection`; None:
            it sees them as they are.
        control_certificate: the projection's figures, see `FittedProjection.certificate`; None without a projection.

    Raises:
        ValueError: if `injection_layers` are not ascending indices of backbone blocks, or do not fit the injection.
    """

    # `from_pretrained(torch_dtype=torch.bfloat16)` leaves these in fp32, as in the backbone.
    _keep_in_fp32_modules = ["scale_shift_table", "norm", "norm1", "norm2", "norm3", "projection"]  # noqa: RUF012
    _no_split_modules = ["C2RControlBlock", "ControlAdapter", "ProjectedControlAdapter"]  # noqa: RUF012
    _repeated_blocks = ["C2RControlBlock"]  # noqa: RUF012
    # The adapter convolves over time, so it runs on whole clips; its tokens are split before the first block.
    _cp_plan = {  # noqa: RUF012
        "control_blocks.0": {"control_hidden_states": ContextParallelInput(split_dim=1, expected_dims=3)}
    }

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
        injection: str = "blocks",
        causal_control: bool = False,
        control_directions: int | None = None,
        control_certificate: dict[str, float] | None = None,
    ):
        super().__init__()
        if injection not in INJECTIONS or (injection == "latent") != (not injection_layers):
            raise ValueError(f"injection is {injection!r} with injection_layers {injection_layers}: they do not fit")
        if injection_layers != sorted(set(injection_layers)) or not set(injection_layers) <= set(range(num_layers)):
            raise ValueError(f"injection_layers are {injection_layers}: not ascending indices below {num_layers}")
        dim = num_attention_heads * attention_head_dim
        self.control_adapter = self._build_adapter()
        self.control_blocks = nn.ModuleList(
            C2RControlBlock(dim, ffn_dim, num_attention_heads, qk_norm, cross_attn_norm, eps) for _ in injection_layers
        )

    def _build_adapter(self):
        """Return a new adapter as the config describes it."""
        config = self.config
        shape = {"dim": config.num_attention_heads * config.attention_head_dim}
        shape |= {"temporal_stride": config.temporal_stride, "causal": config.causal_control}
        shape["gated"] = config.injection == "latent"
        if config.control_directions is None:
            return ControlAdapter(config.feature_dim, **shape)
        return ProjectedControlAdapter(config.feature_dim, config.control_directions, **shape)

    def set_projection(self, projection: FittedProjection):
        """Put a projection before the adapter, in place of one that it may have. The adapter keeps its weights.

        Args:
            projection: of features of width `feature_dim`, with as many directions as it names.

        Raises:
            ValueError: it is of another width.
        """
        feature_dim, directions = self.config.feature_dim, projection.num_directions
        if len(projection.mean) != feature_dim:
            raise ValueError(f"the projection is of width {len(projection.mean)}: expected {feature_dim}")
        new = {"control_directions": directions, "control_certificate": projection.certificate}
        # `from_config` leaves out what Diffusers has noted as a default.
        defaults = [name for name in self.config.get("_use_default_values", []) if name not in new]
        self.register_to_config(**new, _use_default_values=defaults)
        filled = ControlProjection(feature_dim, directions).to(self.device)
        filled.fill(projection)
        old, added = (module.state_dict() for module in (self.control_adapter, filled))
        weights = {name: tensor for name, tensor in old.items() if not name.startswith("projection.")}
        with torch.device("meta"):  # draws no random numbers
            self.control_adapter = self._build_adapter().train(self.training)
        self.control_adapter.load_state_dict(
            weights | {f"projection.{name}": tensor for name, tensor in added.items()}, assign=True
        )

    @classmethod
    def from_transformer(
        cls,
        transformer: WanTransformer3DModel,
        control_layers: int = 15,
        control_stride: int = 1,
        feature_dim: int = 768,
        temporal_stride: int = 4,
        empty: bool = False,
        injection: str = "blocks",
        causal_control: bool = False,
    ) -> "C2RControlNet":
        """Create a control branch with zero residuals from clones of the backbone's first blocks.

        Args:
            transformer: text-to-video backbone of any dtype.
            control_layers, control_stride: see `injection_layers`.
            feature_dim: Dd, DINOv3's width.
            temporal_stride: pixel frames per latent frame of the VAE.
            empty: leave all values undefined; see `load_transformer`.
            injection: see the class; "latent" has no blocks, and its adapter's gate starts at 0.01.
            causal_control: see the class.

        Returns:
            trainable branch in fp32 on the backbone's device. The adapter and the projectors' first layers are drawn
            from torch's global generator.

        Raises:
            InputError: if control_layers and control_stride do not fit the backbone.
        """
        layers = layers_of(injection, control_layers, control_stride, transformer.config.num_layers)
        shared = {name: transformer.config[name] for name in SHARED_CONFIG}
        # By keyword: Diffusers treats positional arguments as defaults, and drops them in `from_config`.
        own_config: dict[str, Any] = {"injection_layers": layers, "injection": injection}
        own_config |= {"feature_dim": feature_dim, "temporal_stride": temporal_stride}
        own_config["causal_control"] = causal_control
        with torch.device("meta"):  # skips the random weights of the clones, 5 billion at 14B
            controlnet = cls(**own_config, **shared)
        controlnet.to_empty(device=transformer.device)
        if empty:
            return controlnet
        controlnet.control_adapter.reset_parameters()
        for control_block, block in zip(controlnet.control_blocks, transformer.blocks):
            control_block.block.load_state_dict(whole_state_dict(block))
            control_block.reset_projector()
        return controlnet
