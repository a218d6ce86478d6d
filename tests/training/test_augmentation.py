import pytest
import torch

from c2r.training.augmentation import CHUNK_SIZE, KINDS, augment_control_frames
from c2r.training.batches import Draw
from c2r.training.step import augment_real_control


def scene(num_frames=3, height=48, width=80):
    """Return (F, 3, H, W): a bright square on shaded, textured ground, and two walls that meet in a straight edge."""
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    texture = 0.02 * torch.rand(height, width, generator=torch.Generator().manual_seed(0))
    frame = torch.stack([0.2 + 0.1 * x, 0.25 + 0.1 * y, 0.2 + 0.05 * x]) + texture
    frame[:, :, width // 2 :] += torch.tensor([0.35, 0.4, 0.3]).view(3, 1, 1)
    frame[:, 10:22, 12:24] = torch.tensor([0.9, 0.85, 0.7]).view(3, 1, 1)
    return frame.repeat(num_frames, 1, 1, 1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(params=list(KINDS))
def kind(request, monkeypatch):
    """Make one kind of alteration the only one."""
    for other in set(KINDS) - {request.param}:
        monkeypatch.delitem(KINDS, other)
    return request.param


def strongest_edge(frame, row):
    """Return the column at whose left side a row of (3, H, W) changes most."""
    return (frame[:, row, 1:] - frame[:, row, :-1]).abs().sum(0).argmax().item() + 1


@pytest.mark.parametrize("seed", range(8))
def test_each_kind_changes_the_look_and_moves_nothing(kind, seed):
    frames = scene()
    before = frames.clone()
    changed = augment_control_frames(frames, generator(seed), chance=1.0)
    assert torch.equal(frames, before)
    assert changed.shape == frames.shape
    assert 0 <= changed.min() <= changed.max() <= 1
    assert (changed - frames).abs().mean() > 1e-3
    frame = changed[0]
    # The square's left side, and the edge between the walls below it: at the same columns as before.
    assert abs(strongest_edge(frame[..., :18], 16) - 12) <= 1
    assert abs(strongest_edge(frame, 40) - 40) <= 1
    # The brightest contrast is still centred where the square is.
    left = frame[..., :36]
    contrast = (left - left.flatten(1).median(1).values.view(3, 1, 1)).abs().sum(0)
    mass = torch.where(contrast > contrast.max() / 2, contrast, 0.0)
    y, x = torch.meshgrid(torch.arange(48.0), torch.arange(36.0), indexing="ij")
    assert abs((mass * x).sum() / mass.sum() - 17.5) < 1.5
    assert abs((mass * y).sum() / mass.sum() - 15.5) < 1.5


def test_all_frames_are_altered_alike(kind):
    frames = scene(num_frames=40)  # more than one chunk
    changed = augment_control_frames(frames, generator(3), chance=1.0)
    assert all(torch.equal(frame, changed[0]) for frame in changed)
    assert not torch.equal(augment_control_frames(frames, generator(4), chance=1.0), changed)
    assert torch.equal(augment_control_frames(frames, generator(3), chance=1.0), changed)


def test_more_frames_than_one_chunk_keep_their_order():
    frames = torch.rand(2 * CHUNK_SIZE + 3, 3, 16, 16, generator=generator())
    changed = augment_control_frames(frames, generator(3), chance=1.0)
    assert changed.shape == frames.shape
    for number, frame in enumerate(frames):
        alone = augment_control_frames(frame[None], generator(3), chance=1.0)
        torch.testing.assert_close(changed[number], alone[0])


def test_each_kind_has_the_effect_of_its_name(kind):
    frames = scene()
    changed = augment_control_frames(frames, generator(1), chance=1.0)
    ground = (slice(None), slice(None), slice(26, 46), slice(2, 38))

    def roughness(clip):
        return (clip[ground][..., 1:] - clip[ground][..., :-1]).abs().mean()

    if kind == "colour":
        assert (changed.mean((0, 2, 3)) / frames.mean((0, 2, 3))).std() > 0.01
    elif kind == "gamma":
        order = frames.flatten().argsort()
        assert (changed.flatten()[order].diff() >= 0).all()  # brighter stays brighter
    elif kind == "flat light":
        sides = changed[0, :, 30:].mean((0, 1))
        before = frames[0, :, 30:].mean((0, 1))
        assert sides[:36].mean() / sides[44:].mean() > before[:36].mean() / before[44:].mean() + 0.1
    elif kind in ("flat texture", "blur"):
        assert roughness(changed) < 0.8 * roughness(frames)
    else:
        assert len(changed.unique()) <= 12


def test_chance_is_the_probability_of_each_kind():
    frames = scene(num_frames=1, height=16, width=16)
    assert torch.equal(augment_control_frames(frames, generator(), chance=0.0), frames)
    drawn = [augment_control_frames(frames, generator(seed), chance=0.1) for seed in range(200)]
    unchanged = sum(torch.equal(clip, frames) for clip in drawn) / len(drawn)
    assert abs(unchanged - 0.9**6) < 0.1


def test_frames_of_another_shape_or_dtype_are_refused():
    for frames in (scene()[0], scene().mul(255).byte(), scene().movedim(1, -1)):
        with pytest.raises(ValueError, match="expected"):
            augment_control_frames(frames, generator())


def augmented(share, clips, domains, first=20):
    numbers = list(range(first, first + len(clips)))
    return augment_real_control(clips, domains, share, 0, Draw(numbers, first_of_step=16, samples_per_step=8))


def test_cg_pairs_and_runs_without_augmentation_stay_unchanged():
    clips, domains = torch.stack([scene(2)] * 4), torch.tensor([0, 1, 0, 1])
    assert augmented(0, clips, domains) is clips
    changed = augmented(1, clips, domains)
    assert [torch.equal(a, b) for a, b in zip(changed, clips)] == [False, True, False, True]
    assert not torch.equal(changed[0], changed[2])


def test_augmentation_depends_on_the_number_of_the_sample_alone():
    clips, domains = torch.rand(4, 2, 3, 16, 16), torch.zeros(4, dtype=torch.long)
    state = torch.get_rng_state()
    alone = augmented(0.5, clips, domains)
    halves = [augmented(0.5, clips[p : p + 2], domains[:2], first=20 + p) for p in (0, 2)]
    assert torch.equal(torch.cat(halves), alone)
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(augmented(0.5, clips, domains, first=24), alone)


def test_control_augmentation_is_the_share_of_real_clips():
    clips, domains = torch.rand(64, 1, 3, 16, 16), torch.zeros(64, dtype=torch.long)
    changed = sum(
        not torch.equal(a, b)
        for first in range(0, 256, 64)
        for a, b in zip(augmented(0.3, clips, domains, first), clips)
    )
    assert 0.2 < changed / 256 < 0.4
