"""ControlAdapter: time, space, width, and the order of the tokens."""

import logging

import pytest
import torch
from torch.nn import functional as F

from c2r.models.control_adapter import ControlAdapter


@pytest.mark.parametrize("num_frames", [1, 5, 9, 81])
def test_frames_of_4k_plus_1_become_k_plus_1_latent_frames(num_frames):
    adapter = ControlAdapter(feature_dim=6, dim=8)
    latent_frames = (num_frames - 1) // 4 + 1
    tokens = adapter(torch.randn(2, num_frames, 2, 3, 6), (latent_frames, 2, 3))
    assert tokens.shape == (2, latent_frames * 6, 8)


@pytest.mark.parametrize(("num_frames", "latent_frames"), [(4, 1), (5, 1), (5, 3), (8, 2), (80, 21)])
def test_other_frame_counts_are_refused(num_frames, latent_frames):
    adapter = ControlAdapter(feature_dim=6, dim=8)
    with pytest.raises(ValueError, match=f"have {num_frames} frames, but {latent_frames} latent frames need"):
        adapter(torch.randn(1, num_frames, 2, 3, 6), (latent_frames, 2, 3))


def test_initially_a_latent_frame_is_the_mean_of_nine_frames():
    adapter = ControlAdapter(feature_dim=3, dim=8)
    features = torch.randn(1, 17, 2, 2, 3)
    downsampled = adapter.temporal_downsample(features)
    assert downsampled.shape == (1, 5, 2, 2, 3)
    torch.testing.assert_close(downsampled[:, 2], features[:, 4:13].mean(1))
    torch.testing.assert_close(downsampled[:, 0], features[:, :5].sum(1) / 9)  # zeros beyond the ends


def test_downsampling_mixes_neither_channels_nor_places():
    adapter = ControlAdapter(feature_dim=3, dim=8)
    features = torch.zeros(1, 5, 2, 2, 3)
    features[:, :, 1, 0, 2] = 1
    downsampled = adapter.temporal_downsample(features)
    assert downsampled.nonzero()[:, 2:].unique(dim=0).tolist() == [[1, 0, 2]]


def test_tokens_are_in_the_backbones_order():
    """Frame by frame, row by row."""
    adapter = ControlAdapter(feature_dim=4, dim=8)
    features = torch.randn(1, 9, 2, 3, 4)
    tokens = adapter(features, (3, 2, 3)).unflatten(1, (3, 2, 3))
    changed = features.clone()
    changed[:, :, 0, 1] += torch.randn(4)
    difference = (adapter(changed, (3, 2, 3)).unflatten(1, (3, 2, 3)) - tokens).abs().amax(-1)[0]
    assert difference[:, 0, 1].min() > 0
    difference[:, 0, 1] = 0
    assert difference.max() == 0


def test_features_on_another_grid_are_resampled_with_one_warning(caplog):
    adapter = ControlAdapter(feature_dim=4, dim=8)
    # Linear in the rows' positions, so bilinear resampling gives the mean of neighbouring rows.
    rows = torch.arange(4.0).view(1, 1, 4, 1, 1).expand(2, 5, 4, 6, 4)
    with caplog.at_level(logging.INFO, logger="c2r.models.control_adapter"):
        halved = adapter._resample(rows, (2, 3))
        adapter._resample(rows, (2, 3))
        tokens = adapter(torch.randn(2, 5, 4, 6, 4), (2, 2, 3))
    assert halved[..., 0].unique().tolist() == [0.5, 2.5]
    assert tokens.shape == (2, 12, 8)
    assert [record.getMessage() for record in caplog.records] == [
        "control features on a 4x6 grid are resampled to the 2x3 token grid"
    ]


def test_tokens_of_a_grid_that_is_not_square_have_the_values_of_the_formula():
    """With weights that differ for each frame of the kernel and each channel."""
    torch.manual_seed(0)
    adapter = ControlAdapter(feature_dim=4, dim=8)
    for parameter in adapter.parameters():
        torch.nn.init.normal_(parameter)
    features, grid = torch.randn(2, 5, 2, 6, 4), (2, 4, 3)
    kernel = adapter.temporal_downsample.conv.weight.view(4, 9).T  # (9, Dd)
    # Latent frame 0 is centred on frame 0, latent frame 1 on frame 4; frames beyond the ends are zero.
    frames = [
        sum(kernel[k] * features[:, centre + k - 4] for k in range(9) if 0 <= centre + k - 4 < 5) for centre in (0, 4)
    ]
    resampled = [
        F.interpolate(frame.movedim(-1, 1), grid[1:], mode="bilinear", align_corners=False).movedim(1, -1)
        for frame in frames
    ]
    tokens = torch.stack([frame[:, row, column] for frame in resampled for row in range(4) for column in range(3)], 1)
    centred = tokens - tokens.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + adapter.norm.eps).sqrt()
    expected = (normed * adapter.norm.weight + adapter.norm.bias) @ adapter.proj.weight.T + adapter.proj.bias
    torch.testing.assert_close(adapter(features, grid), expected, rtol=1e-4, atol=1e-4)


def test_the_norm_computes_in_fp32_with_bf16_weights():
    adapter = ControlAdapter(feature_dim=64, dim=8)
    torch.nn.init.normal_(adapter.norm.weight)
    adapter.to(torch.bfloat16)
    features = torch.randn(3, 64)
    expected = F.layer_norm(features, (64,), adapter.norm.weight.float(), adapter.norm.bias.float(), adapter.norm.eps)
    assert torch.equal(adapter.norm(features), expected)
    assert torch.equal(
        adapter.norm(features.bfloat16()).float(), adapter.norm(features.bfloat16().float()).bfloat16().float()
    )


def test_the_same_grid_is_not_resampled(caplog):
    adapter = ControlAdapter(feature_dim=4, dim=8)
    with caplog.at_level(logging.INFO, logger="c2r.models.control_adapter"):
        adapter(torch.randn(1, 5, 2, 3, 4), (2, 2, 3))
    assert not caplog.records


def test_zero_features_give_finite_tokens_and_gradients():
    adapter = ControlAdapter(feature_dim=4, dim=8)
    tokens = adapter(torch.zeros(1, 5, 2, 3, 4), (2, 2, 3))
    tokens.square().sum().backward()
    assert tokens.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in adapter.parameters())


@pytest.mark.parametrize("feature_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
def test_features_may_have_another_dtype_than_the_weights(feature_dtype, weight_dtype):
    adapter = ControlAdapter(feature_dim=4, dim=8).to(weight_dtype)
    assert adapter(torch.randn(1, 5, 2, 3, 4).to(feature_dtype), (2, 2, 3)).dtype == weight_dtype


def test_the_gradient_under_bf16_autocast_is_that_of_fp32():
    """oneDNN's own gradient has values of 1e30 in about one of three runs."""
    torch.manual_seed(0)
    downsample = ControlAdapter(feature_dim=32, dim=8).temporal_downsample
    for _ in range(20):
        features, gradients = torch.randn(4, 5, 2, 3, 32), []
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = downsample(features).float().square().mean()
            gradients.append(torch.autograd.grad(loss, downsample.conv.weight)[0])
        torch.testing.assert_close(*gradients, rtol=0.05, atol=1e-3)
