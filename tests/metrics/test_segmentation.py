"""Overlap of segments and places of objects: identities, references, order on the toy, models of the real classes."""

import tracemalloc

import numpy as np
import pytest
import torch
from transformers.models.mask2former.modeling_mask2former import Mask2FormerForUniversalSegmentationOutput

from c2r import InputError
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.segmentation import (
    MAX_IDS,
    MaskMIoU,
    SegmentationModel,
    Segments,
    TrajectoryError,
    best_overlap,
    class_miou,
    trajectory_error,
)
from tests.helpers.metric_networks import save_mask2former, save_segformer


def segments(classes, instances=None):
    return Segments(classes, classes if instances is None else instances)


def box(top, left, label=1, background=0, shape=(60, 80)):
    """One frame with a square of 20 pixels."""
    frame = np.full((1, *shape), background, np.int32)
    frame[:, top : top + 20, left : left + 20] = label
    return frame


def test_class_miou_is_that_of_sets_of_pixels():
    rng = np.random.default_rng(0)
    a, b = rng.integers(-1, 4, (2, 3, 20, 30))
    values = []
    for label in range(4):
        first, second = (set(zip(*np.nonzero(labels == label))) for labels in (a, b))
        values.append(len(first & second) / len(first | second))
    assert class_miou(a, b) == pytest.approx(np.mean(values))


def test_a_class_in_one_video_only_counts_as_missed():
    a, b = np.zeros((2, 1, 10, 10), np.int32)
    b[:, :, 5:] = 3
    assert class_miou(a, b) == pytest.approx((0.5 + 0) / 2)
    assert class_miou(a - 1, a - 1) is None


def test_equal_labels_agree_under_any_names():
    rng = np.random.default_rng(0)
    ids = np.kron(rng.integers(0, 5, (2, 4, 4)), np.ones((10, 10), int)).astype(np.int32)
    names = np.array([7, 3, 9, 1, 4])
    assert best_overlap(segments(names[ids]), ids) == 1
    assert trajectory_error(segments(names[ids]), ids) == 0
    assert class_miou(ids, ids) == 1


def test_ids_may_be_any_numbers():
    ids = np.where(box(10, 10) > 0, 2**24 - 7, np.where(box(10, 50) > 0, -3, 0)).astype(np.int32)
    found = box(10, 10) + box(10, 50, label=4)
    assert best_overlap(segments(found), ids) == 1


def test_best_overlap_of_a_moved_square():
    ids, found = box(10, 10), box(10, 15)
    assert best_overlap(segments(found), ids) == pytest.approx(15 / 25)
    found = box(14, 13)  # moved by 4 and 3 pixels
    assert trajectory_error(segments(found), ids) == pytest.approx(5 / 100)


def test_houses_of_one_class_and_a_person_behind_a_post_are_no_fault():
    ids = box(10, 10) + box(10, 50, label=2)
    houses = (ids > 0).astype(np.int32)  # one class: two parts
    assert best_overlap(segments(houses), ids) == 1
    person = box(10, 10)
    person[:, :, 18:21] = 0
    assert best_overlap(segments(person), person) == 1  # one instance in two parts


def test_instances_count_where_classes_touch():
    ids = box(10, 10) + box(10, 30, label=2)
    people = (ids > 0).astype(np.int32)
    assert best_overlap(segments(people), ids) == pytest.approx(0.5)
    assert best_overlap(segments(people, ids), ids) == 1


def test_a_lost_object_is_off_by_the_diagonal():
    nothing = np.full((1, 60, 80), -1, np.int32)
    assert best_overlap(segments(nothing), box(10, 10)) == 0
    assert trajectory_error(segments(nothing), box(10, 10)) == 1


def test_small_regions_and_the_background_are_left_out():
    ids = np.zeros((1, 60, 80), np.int32)
    ids[:, 0, 0] = 1
    assert best_overlap(segments(ids), ids) is None
    assert trajectory_error(segments(ids), ids) is None
    ids[:, 20:40, 20:40] = 2
    assert best_overlap(segments((ids == 2).astype(np.int32)), ids) == 1


def test_own_scene_is_above_another_and_another_above_none(scenes):
    kinds = [one["kinds"].numpy() for one in scenes]
    none = np.zeros_like(kinds[0])
    for i, ids in enumerate(kinds):
        other = kinds[i - 1]
        assert 1 == class_miou(ids, ids) > class_miou(other, ids) > class_miou(none, ids)
        assert 1 == best_overlap(segments(ids), ids) > best_overlap(segments(other), ids)
        assert 0 == trajectory_error(segments(ids), ids) < trajectory_error(segments(other), ids)
        assert best_overlap(segments(other), ids) > best_overlap(segments(none), ids)


@pytest.mark.parametrize("save", [save_segformer, save_mask2former])
def test_segmentation_model_agrees_with_itself(save, small_clips, tmp_path):
    model = SegmentationModel(save(tmp_path / "model"), "cpu")
    video = small_clips[0].video.repeat(3, 1, 1, 1)  # more than one chunk
    found = model(video)
    assert found.classes.shape == found.instances.shape == (9, 48, 80)
    assert set(np.unique(found.classes)) <= set(range(5))
    ids = torch.from_numpy(found.classes + 1).int()
    clip = EvaluatedClip("a", "", video, truth=video.clone(), ids=ids)
    assert MaskMIoU(model)(clip) == 1
    assert MaskMIoU(model, "passes")(clip) == 1
    assert TrajectoryError(model)(clip) == 0
    assert MaskMIoU(model, "control")(clip) is None


def test_the_hole_of_a_rejected_segment_is_no_object(tmp_path):
    """A sure segment covers the left half; an unsure one covers all, keeps the right half only, and is rejected."""
    model = SegmentationModel(save_mask2former(tmp_path / "model"), "cpu")
    masks = torch.full((1, 2, 16, 16), 20.0)
    masks[:, 0, :, 8:] = -20.0
    classes = torch.full((1, 2, 6), -20.0)
    classes[:, 0, 1], classes[:, 1, 2], classes[:, 1, 3] = 0.0, 0.0, -0.5
    outputs = Mask2FormerForUniversalSegmentationOutput(class_queries_logits=classes, masks_queries_logits=masks)
    model.model.register_forward_hook(lambda *_: outputs)
    found = model(torch.rand(1, 3, 64, 64))
    assert np.unique(found.instances[0, :, :30]).tolist() == [1]
    assert np.unique(found.instances[0, :, 34:]).tolist() == [-1]


def test_small_ids_cost_no_memory_and_too_many_are_refused():
    ids = np.arange(128 * 128, dtype=np.int32).reshape(1, 128, 128) % MAX_IDS
    ids[:, :20, :20] = 7
    clip = EvaluatedClip("street", "", torch.zeros(1, 3, 128, 128), ids=torch.from_numpy(ids))
    labels = np.where(np.indices((128, 128)).max(0) < 20, 3, np.arange(128 * 128).reshape(128, 128) % 2000)[None]
    tracemalloc.start()
    value = MaskMIoU(lambda video: segments(labels), "passes")(clip)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert value == pytest.approx(400 / np.sum((labels == 3) | (ids == 7)), abs=0.05)
    assert peak < 30e6  # a table of all ids and segments takes 80 MB, and there are several
    many = np.arange(128 * 128, dtype=np.int32).reshape(1, 128, 128)
    clip = EvaluatedClip("street", "", torch.zeros(1, 3, 128, 128), ids=torch.from_numpy(many))
    for measure in (MaskMIoU(None, "passes"), TrajectoryError(None)):
        with pytest.raises(InputError, match=r"street: its pass of object ids has 16384 ids in frame 0, more than"):
            measure(clip)
