"""Tests of the files and lines that an evaluation writes: numbers, intervals, differences and remarks."""

import json
from itertools import combinations

import pytest
from PIL import Image

from c2r.evaluation.monitor import SCORE_RANGE, CGLook, Score
from c2r.scoring.measuring import CG_LOOK, Description, Scores
from c2r.scoring.page import evaluation_page
from c2r.scoring.picture import draw_scores
from c2r.scoring.results import Evaluation, interval_text
from c2r.scoring.scenes import ClipFormat
from c2r.scoring.statistics import Interval

FORMAT = ClipFormat(5, 32, 48, 8.0)
EDGES = Description("edge_f1", True, "truth", "share", (0.0, 1.0))
LOOK = Description(CG_LOOK, None, "itself", "0 real, 1 CG", SCORE_RANGE)


def evaluation_of(values, measures=(EDGES,), looks=None):
    """Return an evaluation of {source: {measure: a value or None for each clip}}."""
    count = len(next(iter(next(iter(values.values())).values())))
    names = [f"f{i}" for i in range(count)]
    rows = {
        source: {name: {scene: [value] for scene, value in zip(names, clips)} for name, clips in of_source.items()}
        for source, of_source in values.items()
    }
    seeds = dict.fromkeys(values, (None,))
    scores = Scores(
        names,
        {measure.name: measure for measure in measures},
        rows,
        looks=looks or {},
        seeds=seeds,
        pairs=[*combinations(values, 2)],
    )
    return Evaluation(FORMAT, 1, scores)


def test_a_measure_with_values_for_few_clips_is_remarked():
    clips = [0.1 * i for i in range(8)]
    few = [*clips[:5], None, None, None]
    both = evaluation_of({"a": {"edge_f1": clips}, "b": {"edge_f1": few}})
    remarks = both.remarks
    assert "edge_f1: 5 clips with a value are too few for an interval; it takes 6" in remarks
    assert any(line.startswith("edge_f1: two sources share 5 clips with a value, too few") for line in remarks)
    assert evaluation_of({"a": {"edge_f1": clips}}).remarks == []
    assert evaluation_of({"a": {"edge_f1": clips[:4]}}).remarks == [
        "4 clips are too few for intervals; give at least 6"
    ]


@pytest.mark.parametrize(
    ("clips", "shift", "verdict"),
    [(8, 0.2, "better"), (8, -0.2, "worse"), (8, 0.0, "within chance"), (4, 0.2, "too few clips to tell")],
)
def test_the_verdict_tells_few_clips_from_no_difference(clips, shift, verdict, tmp_path):
    one = [0.3 + 0.01 * i for i in range(clips)]
    other = [value + shift + 0.002 * (-1) ** i for i, value in enumerate(one)]
    evaluation = evaluation_of({"a": {"edge_f1": one}, "b": {"edge_f1": other}})
    [difference] = evaluation.differences
    assert evaluation.verdict(difference) == verdict
    lines = [line for line in evaluation.lines() if line.startswith("beyond chance: edge_f1 of b − a")]
    assert [line.endswith(verdict) for line in lines] == [True] * (verdict in ("better", "worse"))
    page = evaluation_page(evaluation, b"", {}, [], {})
    assert verdict in page
    assert ("1 cannot be: with 1 differences it takes 6 clips" in page) == (clips == 4)
    evaluation.write(tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["differences"][0]["verdict"] == verdict


def test_the_cg_look_has_one_interval_wherever_it_is_written(tmp_path):
    texture, look = Score(-0.2, 0.2, 6.0, 8, 0.9), Score(0.4, 0.3, 6.0, 8)
    judged = CGLook(look, {"texture": texture, "lighting": texture}, ("lighting",))
    evaluation = evaluation_of({"a": {CG_LOOK: [0.01 * i for i in range(8)]}}, [LOOK], {"a": judged})
    low, high = look.interval(0.95)
    evaluation.write(tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["measures"][CG_LOOK]["sources"]["a"] == {"mean": 0.4, "low": low, "high": high, "clips": 8}
    parts = "CG look by texture −0.20, lighting −0.20 (uninformative, left out)"
    assert written["cg_looks"] == {"a": parts}
    printed = [*evaluation.lines()]
    assert f"  a: {interval_text(Interval(0.4, low, high))}" in printed
    assert sum("[" in line for line in printed) == 1
    (tmp_path / "plot.png").write_bytes(draw_scores(evaluation.scores))
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.size[0] == 1200


def test_the_file_of_clips_and_the_numbers_agree(tmp_path):
    evaluation = evaluation_of({"a": {"edge_f1": [0.5, None, 0.25]}, "b": {"edge_f1": [1.0, 0.0, 0.5]}})
    evaluation.write(tmp_path)
    rows = (tmp_path / "clips.csv").read_text().splitlines()
    assert rows == ["source,clip,seed,edge_f1", "a,f0,,0.5", "a,f1,,", "a,f2,,0.25", "b,f0,,1", "b,f1,,0", "b,f2,,0.5"]
    written = json.loads((tmp_path / "results.json").read_text())
    assert written["measures"]["edge_f1"]["sources"]["a"] == {"mean": 0.375, "low": None, "high": None, "clips": 2}
    assert written["differences"][0]["mean"] == pytest.approx(0.375)
