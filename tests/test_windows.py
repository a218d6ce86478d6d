"""Long videos: windows, their weights, their noise, and the pipeline with them."""

from itertools import pairwise

import pytest
import torch

from c2r.windows import Window, blend_windows, default_overlap, extend_noise, plan_windows


def weights_of(windows):
    """The weight of each window at each latent frame, by blending predictions of ones and zeros."""
    like = torch.empty(1, 1, windows[-1].stop, 1, 1)
    rows = []
    for chosen in range(len(windows)):

        def predict(number, chosen=chosen):
            window = windows[number]
            return torch.full((1, 1, window.stop - window.start, 1, 1), float(number == chosen))

        rows.append(blend_windows(windows, predict, like).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("length", [2, 3, 21])
def test_windows_cover_the_video_and_their_weights_sum_to_one(length):
    for overlap in {1, length // 2, length - 1} - {0}:
        for num_latent_frames in range(1, 3 * length + 2):
            windows = plan_windows(num_latent_frames, length, overlap)
            assert (windows[0].start, windows[-1].stop) == (0, num_latent_frames)
            assert {w.stop - w.start for w in windows} == {min(length, num_latent_frames)}
            assert all(b.start - a.start == length - overlap for a, b in pairwise(windows[:-1]))
            assert all(b.overlap == a.stop - b.start >= overlap for a, b in pairwise(windows))
            weights = weights_of(windows)
            torch.testing.assert_close(weights.sum(0), torch.ones(num_latent_frames))
            assert weights.min() >= 0
            # The first latent frame of a window in the middle has another meaning to the model.
            assert all(weights[i, w.start] == 0 for i, w in enumerate(windows) if i)


def test_weights_rise_linearly_over_the_overlap():
    first, second = weights_of(plan_windows(8, 6, 4))
    torch.testing.assert_close(second, torch.tensor([0, 0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1]))
    torch.testing.assert_close(first, 1 - second)


def test_an_overlap_that_is_no_overlap_is_refused():
    for overlap in (0, 5):
        with pytest.raises(ValueError, match=f"overlap is {overlap}: it must be at least 1 and below 5"):
            plan_windows(9, 5, overlap)
    assert plan_windows(5, 5, 0) == [Window(0, 5)]


def test_a_window_in_the_middle_has_the_control_of_its_latent_frames():
    window = Window(3, 6)
    # Latent frame s > 0 encodes pixel frames 4s - 3 to 4s: the window starts with the last one of its first.
    assert list(range(100))[window.frames(4)] == list(range(12, 21))
    assert list(range(100))[Window(0, 3).frames(4)] == list(range(9))


def test_equal_predictions_are_blended_to_themselves():
    whole = torch.randn(2, 3, 11, 4, 4, generator=torch.Generator().manual_seed(0))
    for overlap in (1, 2, 4):
        windows = plan_windows(11, 5, overlap)
        blended = blend_windows(windows, lambda number: whole[:, :, windows[number].latents], whole)  # noqa: B023
        assert torch.equal(blended, whole)


def test_noise_of_a_latent_frame_does_not_depend_on_the_length():
    def noise(length, batch_generators=False):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        generator = generators if batch_generators else generators[0]
        if batch_generators:
            first = torch.cat([torch.randn(1, 4, 3, 2, 2, generator=g) for g in generators])
        else:
            first = torch.randn(2, 4, 3, 2, 2, generator=generator)
        return extend_noise(first, length, generator)

    for batch_generators in (False, True):
        longest = noise(11, batch_generators)
        assert longest.shape == (2, 4, 11, 2, 2)
        assert all(torch.equal(noise(n, batch_generators), longest[:, :, :n]) for n in (3, 4, 8))
        assert len(longest.unique()) == longest.numel()


def test_default_overlap_is_about_a_quarter():
    assert [default_overlap(length) for length in (2, 3, 4, 13, 21)] == [1, 1, 1, 3, 5]
