"""Measures of several sources: seeds, pairs, groups of the jackknife, and the one interval of the CG look."""

from itertools import combinations

import numpy as np
import pytest
import torch

from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.evaluation.monitor import SCORE_RANGE, CGLook, Score
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.distances import KernelDistance
from c2r.metrics.structure import EdgeF1, edge_f1
from c2r.scoring.measuring import CG_LOOK, Description, Scores, Source, _distance, measure_videos, pairs_to_compare
from c2r.scoring.scenes import ClipFormat, read_scenes
from c2r.scoring.statistics import bootstrap_interval, holm, jackknife_interval, sign_test
from tests.helpers.datasets import noise_video, write_dataset

FORMAT = ClipFormat(5, 32, 48, 8.0)


def scores_of(values, measure=None, **more):
    """Return scores by one measure: {source: a list for each clip of the values of its seeds}."""
    measure = measure or Description("edge_f1", True, "truth", "share", (0.0, 1.0))
    scenes = [f"f{i}" for i in range(len(next(iter(values.values()))))]
    by_source = {source: {measure.name: dict(zip(scenes, clips))} for source, clips in values.items()}
    return Scores(scenes, {measure.name: measure}, by_source, pairs=[*combinations(values, 2)], **more)


def test_seeds_of_a_clip_are_averaged_before_clips_are(tmp_path):
    scenes = read_scenes(str(write_dataset(tmp_path / "d", ["f0.mp4", "f1.mp4"], ["rain"] * 2)), tmp_path, None, None)
    videos = {}
    for number, scene in enumerate(scenes):
        videos[scene.name] = [tmp_path / f"{scene.name}-{seed}.mp4" for seed in range(2)]
        for seed, path in enumerate(videos[scene.name]):
            write_video(path, noise_video(10 * number + seed), FORMAT.fps)
    source = Source("a", videos, (0, 1))
    scores = measure_videos([source], scenes, FORMAT, [EdgeF1("truth"), EdgeF1("control")], [], None)
    for scene in scenes:
        window = (0.0, FORMAT.num_frames, FORMAT.fps, FORMAT.height, FORMAT.width)
        truth, *made = (read_window(path, *window).float() / 255 for path in (scene.truth.path, *videos[scene.name]))
        expected = [edge_f1(video, truth) for video in made]
        assert scores.values["a"]["edge_f1"][scene.name] == pytest.approx(expected)
        assert scores.of_clips("a", "edge_f1")[scene.name] == pytest.approx(np.mean(expected))
    assert scores.skipped == {
        "edge_f1_control": "has no value for any clip: the dataset has no coarse videos (control_name)"
    }
    assert [*scores.measures] == ["edge_f1"]


def test_differences_are_second_minus_first_of_shared_clips_and_corrected():
    rng = np.random.default_rng(0)
    values = {
        name: [[float(v)] for v in rng.uniform(shift, shift + 0.3, 10)] for name, shift in zip("abc", (0, 0.1, 0.5))
    }
    values["b"][3] = [None]
    scores = scores_of(values)
    found = {(d.first, d.second): d for d in scores.differences()}
    assert [*found] == [("a", "b"), ("a", "c"), ("b", "c")]
    plain = {}
    for first, second in found:
        pairs = [(x[0], y[0]) for x, y in zip(values[first], values[second]) if None not in (x[0], y[0])]
        differences = [y - x for x, y in pairs]
        assert found[first, second].clips == len(pairs) == (10 if "b" not in (first, second) else 9)
        assert found[first, second].interval == bootstrap_interval(differences)
        plain[first, second] = sign_test(differences)
    assert [d.p_value for d in found.values()] == holm([*plain.values()])
    assert found["a", "c"].p_value > plain["a", "c"]


def test_pairs_that_answer_a_question_are_compared():
    def sources(model, *controls):
        return [Source(f"{model}, {control}", {}, (0,), model, control) for control in controls]

    two = [*sources("a", "none", "own", "shuffled"), *sources("b", "own", "none")]
    within = [("a, none", "a, own"), ("a, shuffled", "a, own"), ("b, none", "b, own")]
    assert pairs_to_compare(two) == [*within, ("a, own", "b, own")]
    others = [*sources("a", "own"), *sources("phase 1", "none"), Source("elsewhere", {})]
    names = [source.name for source in others]
    assert pairs_to_compare(others) == [*combinations(names, 2)]
    assert pairs_to_compare(sources("a", "shuffled", "none")) == [("a, none", "a, shuffled")]
    assert pairs_to_compare(sources("a", "own")) == []


def test_intervals_are_cut_to_the_range_of_their_measure():
    clips = [[0.99], [1.0], [0.4], [1.0], [0.98], [1.0], [0.97], [1.0]]
    assert bootstrap_interval([v for (v,) in clips]).high > 1
    assert scores_of({"a": clips}).interval("a", "edge_f1").high == 1
    [difference] = scores_of({"a": [[0.0]] * 8, "b": clips}).differences()
    assert difference.interval.high == 1
    assert difference.interval.low < difference.interval.mean


@pytest.mark.parametrize("count", [8, 20, 23, 39])
def test_groups_of_the_jackknife_hold_whole_scenes_and_weigh_by_their_number(count):
    """Against groups that are made by hand: scenes k, k + 20, … in group k; each has two videos."""
    torch.manual_seed(count)
    truths, scenes, positions = torch.rand(count, 1, 3, 1, 4), torch.rand(count, 2, 1, 3, 1, 4), []
    metric = KernelDistance(lambda video: video[:, :, 0].flatten(1), "kd")
    for number in range(count):
        for seed in range(2):
            metric.update(EvaluatedClip(f"f{number}", "", scenes[number, seed], truth=truths[number]))
        positions.append([2 * number, 2 * number + 1])
    groups = {}
    for number in range(count):
        groups.setdefault(number % 20, []).append(number)
    left_out = [
        metric.compute([p for number in range(count) if number not in group for p in positions[number]])
        for group in groups.values()
    ]
    expected = jackknife_interval(metric.compute(), left_out, [len(group) for group in groups.values()])
    interval = _distance(metric, positions)
    assert (interval.low, interval.mean, interval.high) == pytest.approx((expected.low, expected.mean, expected.high))


def test_the_cg_look_has_the_interval_of_the_monitor():
    """It includes the error of the clips that are compared with, which a bootstrap over the videos does not."""
    look = Score(0.4, 0.3, 6.0, 8)
    measure = Description(CG_LOOK, None, "itself", "0 real, 1 CG", SCORE_RANGE)
    clips = [[0.35 + 0.01 * i] for i in range(8)]
    scores = scores_of({"a": clips}, measure, looks={"a": CGLook(look, {"texture": look}, ())})
    interval = scores.interval("a", CG_LOOK)
    low, high = look.interval(0.95)
    assert (interval.low, interval.mean, interval.high) == (low, 0.4, high)
    assert interval.low < bootstrap_interval([value for (value,) in clips]).low
    assert scores.num_clips("a", CG_LOOK) == 8
