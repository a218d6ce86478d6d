"""The control adapter: DINOv3 patch features to control tokens on the backbone's token grid."""

import logging

import torch
import torch.nn.functional as F
from diffusers.models.normalization import FP32LayerNorm
from einops import rearrange
from torch import nn

logger = logging.getLogger(__name__)

#: Start value of the gate. Source: the released C2R
INITIAL_GATE = 0.01


class SafeConv3d(nn.Conv3d):
    """Convolution in at least fp32 on the CPU: oneDNN's bf16 gradient of a depthwise kernel has undefined values."""

    def forward(self, frames):
        if frames.device.type not in ("cpu", "meta"):
            return super().forward(frames)
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return self._conv_forward(frames.to(dtype), self.weight.to(dtype), None).to(self.weight.dtype)


class TemporalDownsample(nn.Module):
    """Depthwise convolution over time from F = stride·k + 1 frames to T = k + 1 latent frames.

    The kernel has 2·stride + 1 frames. It is centred on every stride-th frame or, if causal, ends there, so
    neighbouring latent frames overlap; frames beyond the ends of the clip are zero. Wan's VAE encodes frame 0 alone,
    then groups of `stride` frames: [0], [1–4], [5–8], … At the start a latent frame is the mean of its own group; that
    of frame 0 is 1 / stride of the frame, a scale that the adapter's LayerNorm removes.

    Args:
        feature_dim: Dd.
        stride: pixel frames per latent frame.
        causal: see above.
    """

    def __init__(self, feature_dim: int, stride: int, causal: bool = False):
        super().__init__()
        self.conv = SafeConv3d(
            feature_dim,
            feature_dim,
            kernel_size=(2 * stride + 1, 1, 1),
            stride=(stride, 1, 1),
            padding=(0 if causal else stride, 0, 0),
            groups=feature_dim,
            bias=False,
        )
        self.past = 2 * stride if causal else 0  # frames before the clip, besides the convolution's padding
        self.reset_parameters()

    def reset_parameters(self):
        """Make each output the mean over the group of frames that the VAE encodes in the same latent frame."""
        stride = self.conv.stride[0]
        last = self.past or stride  # the kernel's place of the last frame of the group
        nn.init.zeros_(self.conv.weight)
        nn.init.constant_(self.conv.weight[:, :, last - stride + 1 : last + 1], 1 / stride)

    def forward(self, control_features: torch.Tensor) -> torch.Tensor:
        """Downsample (B, F, h, w, Dd) to (B, T, h, w, Dd)."""
        if not torch.is_autocast_enabled(control_features.device.type):
            control_features = control_features.to(self.conv.weight.dtype)  # DINOv3 may have another dtype
        features = rearrange(control_features, "b f h w d -> b d f h w")
        if self.past:
            features = F.pad(features, (0, 0, 0, 0, self.past, 0))
        features = self.conv(features)
        return rearrange(features, "b d t h w -> b t h w d")


class ControlAdapter(nn.Module):
    """Maps control features from pixel frames to latent frames and from DINOv3's width to the backbone's.

    Temporal convolution, resampling in space where the two grids differ, LayerNorm, Linear. The shapes are those of
    the released C2R adapter, with the gate too, and so are the initial values, except those of the convolution. The
    released one starts at 1/9 for each of nine frames, whose centre is 1.5 frames late of the group [4t − 3, 4t] that
    the VAE encodes in latent frame t; its latent frame 0 starts as a sum over frames 0 to 4.

    Args:
        feature_dim: Dd, DINOv3's width.
        dim: D, the backbone's width.
        temporal_stride: pixel frames per latent frame of the VAE.
        gated: multiply the tokens by a trained number, for tokens that are added to the latents as they are.
        causal: a latent frame sees no frame after its own, the last eight instead of four before and four after.
    """

    def __init__(
        self,
        feature_dim: int,
        dim: int,
        temporal_stride: int = 4,
        gated: bool = False,
        causal: bool = False,
    ):
        super().__init__()
        self.temporal_stride = temporal_stride
        self.temporal_downsample = TemporalDownsample(feature_dim, temporal_stride, causal)
        # Computes in fp32 with weights of any dtype; maps all-zero features (a blank control) to its bias.
        self.norm = FP32LayerNorm(feature_dim)
        self.proj = nn.Linear(feature_dim, dim)
        # (1,) instead of a scalar, because engines cannot shard a scalar.
        self.gate = nn.Parameter(torch.full((1,), INITIAL_GATE)) if gated else None
        self._resampling_reported = False

    def reset_parameters(self):
        """Draw new initial weights."""
        for module in (self.temporal_downsample, self.norm, self.proj):
            module.reset_parameters()
        if self.gate is not None:
            nn.init.constant_(self.gate, INITIAL_GATE)

    def forward(self, control_features: torch.Tensor, token_grid: tuple[int, int, int]) -> torch.Tensor:
        """Return control tokens in the order of the backbone's tokens.

        Args:
            control_features: (B, F, h', w', Dd).
            token_grid: (T, h, w), the backbone's token grid.

        Returns:
            (B, T·h·w, D).

        Raises:
            ValueError: if F frames do not give T latent frames.
        """
        num_frames, latent_frames = control_features.shape[1], token_grid[0]
        expected = self.temporal_stride * (latent_frames - 1) + 1
        if num_frames != expected:
            raise ValueError(
                f"control features have {num_frames} frames, but {latent_frames} latent frames need {expected} "
                f"({self.temporal_stride}·{latent_frames - 1} + 1)"
            )
        features = self.temporal_downsample(control_features)  # (B, T, h', w', Dd)
        if features.shape[2:4] != tuple(token_grid[1:]):
            features = self._resample(features, token_grid[1:])
        features = rearrange(features, "b t h w d -> b (t h w) d")
        tokens = self.proj(self.norm(features))
        return tokens if self.gate is None else self.gate.to(tokens.dtype) * tokens

    def _resample(self, features, grid):
        """Resample (B, T, h', w', Dd) to (B, T, h, w, Dd), bilinearly."""
        if not self._resampling_reported:
            self._resampling_reported = True
            logger.warning(
                "control features on a %dx%d grid are resampled to the %dx%d token grid", *features.shape[2:4], *grid
            )
        frames = rearrange(features, "b t h w d -> (b t) h w d")
        frames = rearrange(frames, "n h w d -> n d h w")  # a second step: channels stay last in memory, one copy less
        frames = F.interpolate(frames, size=tuple(grid), mode="bilinear", align_corners=False)
        return rearrange(frames, "(b t) d h w -> b t h w d", b=len(features))
