"""ControlAdapter: time, space, width, and the order of the tokens."""

import logging

import pytest
import torch
from torch.nn import functional as F

from c2r.models.control_adapter import ControlAdapter
from tests.helpers.tiny import tiny_vae


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


def frames_seen(downsample, num_frames=17):
    """Return {latent frame: pixel frames on which it depends}, by the gradients."""
    features = torch.randn(1, num_frames, 1, 1, 3, dtype=torch.float64, requires_grad=True)
    seen = {}
    for latent_frame, output in enumerate(downsample(features).unbind(1)):
        (gradient,) = torch.autograd.grad(output.sum(), features, retain_graph=True)
        seen[latent_frame] = gradient.abs().sum((0, 2, 3, 4)).nonzero().flatten().tolist()
    return seen


@pytest.mark.parametrize("causal", [False, True])
def test_initially_a_latent_frame_sees_the_frames_that_the_vae_encodes_in_it(causal):
    downsample = ControlAdapter(feature_dim=3, dim=8, causal=causal).double().temporal_downsample
    groups = {0: [0]} | {t: list(range(4 * t - 3, 4 * t + 1)) for t in range(1, 5)}
    assert frames_seen(downsample) == groups
    features = torch.randn(1, 17, 2, 2, 3, dtype=torch.float64)
    means = [features[:, frames].sum(1) / 4 for frames in groups.values()]  # frame 0: a quarter of it
    torch.testing.assert_close(downsample(features), torch.stack(means, 1), rtol=0, atol=1e-15)


def test_the_vae_encodes_these_frames():
    """No latent frame depends on a frame after its group."""
    vae = tiny_vae().double()
    frames = torch.randn(1, 3, 9, 16, 16, dtype=torch.float64, requires_grad=True)
    for latent_frame, output in enumerate(vae.encode(frames).latent_dist.mean.unbind(2)):
        (gradient,) = torch.autograd.grad(output.square().sum(), frames, retain_graph=True)
        seen = gradient.abs().sum((0, 1, 3, 4)).nonzero().flatten().tolist()
        assert seen[-1] == 4 * latent_frame


def test_what_a_trained_kernel_can_see():
    """Four frames before and after every fourth one, or if causal the eight frames before."""
    for causal, before, after in ((False, 4, 4), (True, 8, 0)):
        downsample = ControlAdapter(feature_dim=3, dim=8, causal=causal).double().temporal_downsample
        torch.nn.init.uniform_(downsample.conv.weight, 0.5, 1)
        expected = {t: list(range(max(0, 4 * t - before), min(16, 4 * t + after) + 1)) for t in range(5)}
        assert frames_seen(downsample) == expected


def test_a_causal_adapter_gives_a_longer_video_the_same_first_tokens():
    for causal in (False, True):
        adapter = ControlAdapter(feature_dim=3, dim=8, causal=causal).double()
        torch.nn.init.normal_(adapter.temporal_downsample.conv.weight)
        features = torch.randn(1, 17, 2, 2, 3, dtype=torch.float64)
        whole, start = adapter(features, (5, 2, 2)), adapter(features[:, :9], (3, 2, 2))
        assert torch.equal(whole[:, : start.shape[1]], start) == causal


def test_a_dot_that_moves_by_a_cell_a_frame_arrives_in_time():
    """Mean position in a latent frame: with the released start values 1.5 cells ahead of the VAE's group."""

    def positions(downsample):
        dots = torch.eye(33, dtype=torch.float64).view(1, 33, 1, 33, 1)  # frame n: in column n
        seen = downsample(dots)[0, 1:-1, 0, :, 0]  # (T, w); the first and last latent frame lack neighbours
        return (seen * torch.arange(33)).sum(1) / seen.sum(1)

    group_means = torch.tensor([4 * t - 1.5 for t in range(1, 8)], dtype=torch.float64)
    for causal in (False, True):
        downsample = ControlAdapter(feature_dim=1, dim=8, causal=causal).double().temporal_downsample
        torch.testing.assert_close(positions(downsample), group_means)
    released = ControlAdapter(feature_dim=1, dim=8).double().temporal_downsample
    torch.nn.init.constant_(released.conv.weight, 1 / 9)
    torch.testing.assert_close(positions(released), group_means + 1.5)


def test_the_first_latent_frame_has_the_tokens_of_its_frame_in_a_group_of_equals():
    """Its quarter is a scale, which the norm removes up to its epsilon."""
    adapter = ControlAdapter(feature_dim=16, dim=8).double()
    frame = torch.randn(1, 1, 2, 2, 16, dtype=torch.float64)
    tokens = adapter(frame.expand(1, 5, 2, 2, 16), (2, 2, 2)).unflatten(1, (2, 4))
    torch.testing.assert_close(tokens[:, 0], tokens[:, 1], rtol=1e-3, atol=1e-3)


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
