"""The runs of the study, and its results."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from c2r import InputError, cli
from c2r.options import PHASE2
from c2r.toy import city
from c2r.toy.folder import write_toy
from c2r.toy.study_results import (
    COMPARED_MEASURES,
    CONFIDENCE,
    MEASURES,
    Result,
    draw_control,
    draw_remedies,
    excludes_zero,
    paired_difference,
    read_results,
    study_tables,
    values_of,
    write_results,
)
from c2r.toy.study_runs import OPTIONS, RATIOS, caption_cg, planned_runs, select_runs

PUBLISHED = Path(__file__).parents[2] / "docs/study/results.csv"


def result(name, seed, **values):
    return Result(name, seed, dict.fromkeys(MEASURES, 0.25) | {"cg_texture": None} | values, seconds=7)


def some_results(*names):
    return [result(name, seed) for name in names for seed in (0, 1)]


def rows_of(table):
    """Return {first cell: other cells} of the lines of Markdown tables."""
    lines = [line.strip("| ").split("|") for line in table.splitlines() if line.startswith("|")]
    return [(cells[0].strip(), [cell.strip() for cell in cells[1:]]) for cells in lines]


@pytest.mark.parametrize("run", planned_runs(), ids=lambda run: run.name)
def test_every_planned_run_is_a_valid_command(run, tmp_path):
    options = OPTIONS | run.options
    required = ["--resume_backbone_from=b", "--real_dataset=r", "--cg_dataset=c", f"--output_dir={tmp_path}"]
    args = cli.parse(PHASE2, [*(f"--{name}={value}" for name, value in options.items()), *required])
    assert {name: getattr(args, name) for name in options} == options


def test_published_results_are_of_the_planned_runs():
    published, planned = {result.run for result in read_results(PUBLISHED)}, {run.name for run in planned_runs()}
    assert published == planned


def test_each_setting_differs_from_its_baseline():
    runs = {run.name: run for run in planned_runs()}
    assert len(runs) == len(planned_runs())
    assert [run.name for run in runs.values() if run.baseline is None] == ["cg 0.2"]
    for run in runs.values():
        if run.baseline is not None:
            baseline = runs[run.baseline]
            changed = run.options.items() ^ baseline.options.items()
            kinds = [getattr(run, name) != getattr(baseline, name) for name in ("adapted", "dinov3", "named_cg")]
            assert sum(kinds) + bool(changed) == 1, run.name


def test_each_setting_has_differences_in_the_published_results():
    results = read_results(PUBLISHED)
    for run in planned_runs():
        if run.baseline is not None:
            for measure in COMPARED_MEASURES:
                if measure == "leak_share_coarse" and not values_of(results, run.name, measure):
                    continue  # a share of hardly any control gain
                assert math.isfinite(paired_difference(results, run.name, run.baseline, measure).low), run.name


def test_settings_are_selected_by_whole_names_and_by_parts():
    runs = planned_runs()
    assert select_runs(runs, None) == runs
    assert [run.name for run in select_runs(runs, ["cg 0"])] == ["cg 0"]
    names = [run.name for run in select_runs(runs, ["probe", "no phase 1", "probe cg 0.5"])]
    assert sorted(names) == sorted(
        [*(f"cg {ratio:g}, no phase 1" for ratio in RATIOS), *(f"probe cg {ratio:g}" for ratio in RATIOS[:-1])]
    )
    with pytest.raises(InputError, match=r"^--only prob, cg: in the name of no setting; .*: cg 0; cg 0\.1; "):
        select_runs(runs, ["probe", "prob, cg"])


def test_results_are_read_as_they_were_written(tmp_path):
    assert read_results(tmp_path / "results.csv") == []
    results = some_results("cg 0.1", "cg 0.5, controller")
    write_results(tmp_path / "results.csv", results)
    assert read_results(tmp_path / "results.csv") == results
    assert values_of(results, "cg 0.1", "loss") == [0.25, 0.25]
    assert values_of(results, "cg 0.1", "cg_texture") == []
    write_results(tmp_path / "results.csv", read_results(PUBLISHED))
    assert (tmp_path / "results.csv").read_bytes() == PUBLISHED.read_bytes()


def test_an_unfinished_study_is_drawn_and_printed(tmp_path):
    results = some_results("cg 0.1", "cg 0.5", "cg 0.5, no phase 1")
    draw_control(tmp_path / "control.png", results, RATIOS)
    draw_remedies(tmp_path / "remedies.png", results, {run.name: run.baseline for run in planned_runs()})
    for picture in ("control.png", "remedies.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    table = study_tables(results, {run.name: run.baseline for run in planned_runs()})
    assert [first for first, _ in rows_of(table)] == [
        *("setting", "-" * 18, "cg 0.1", "cg 0.5", "cg 0.5, no phase 1"),
        *("setting", "-" * 18, "cg 0.1", "cg 0.5", "cg 0.5, no phase 1"),
    ]


def test_paired_intervals_are_those_of_scipy():
    rng = np.random.default_rng(0)
    for count in (2, 3, 8):
        common = rng.normal(size=count)  # what the seeds share drops out of the differences
        first, second = common + rng.normal(0.3, 0.1, count), common
        results = [result("a", seed, loss=value) for seed, value in enumerate(first)]
        # In another order, and with a seed that the other setting does not have.
        results += [result("b", seed, loss=value) for seed, value in reversed(list(enumerate([*second, 9.0])))]
        difference = paired_difference(results, "a", "b", "loss")
        expected = stats.ttest_rel(first, second).confidence_interval(CONFIDENCE)
        np.testing.assert_allclose((difference.low, difference.high), expected, rtol=1e-9)
        np.testing.assert_allclose(difference.mean, (first - second).mean())
        assert excludes_zero(difference) == (expected.low > 0 or expected.high < 0)


def test_a_missing_measure_and_a_single_seed_give_no_interval():
    results = [result("a", 0, loss=0.5), result("a", 1, loss=None), result("b", 0), result("b", 1)]
    single = paired_difference(results, "a", "b", "loss")
    assert single.mean == 0.25
    assert math.isnan(single.low)
    assert math.isnan(single.high)
    assert not excludes_zero(single)
    assert paired_difference(results, "a", "c", "loss") is None
    assert paired_difference(results, "a", "b", "cg_texture") is None
    assert "With one seed there are no intervals." in study_tables(
        [result("a", 0), result("b", 0)], {"a": None, "b": "a"}
    )


def test_the_tables_give_means_and_marked_differences():
    gains = {"a": (0.1, 0.2, 0.3), "b": (0.2, 0.31, 0.42), "c": (0.2, 0.1, 0.3)}
    results = [
        result(name, seed, control_gain=gain, leak_share_coarse=None if name == "c" else 0.25, people_own=-0.5)
        for name, of_seeds in gains.items()
        for seed, gain in enumerate(of_seeds)
    ]
    text = study_tables(results, {"a": None, "b": "a", "c": "a", "not run": "a"})
    means, differences = rows_of(text)[:5], rows_of(text)[5:]
    assert means[2] == ("a", ["3", "−0.500", "0.250", "0.250", "0.200", "0.250", "0.250", "0.250"])
    assert means[4] == ("c", ["3", "−0.500", "0.250", "0.250", "0.200", "–", "0.250", "0.250"])
    assert [name for name, _ in differences] == ["setting", "-------", "b", "c"]
    same = "+0.000 [+0.000, +0.000]"
    # The differences 0.10, 0.11 and 0.12 have the standard error 0.01 / √3; t is 2.920 with two degrees of freedom.
    assert differences[2][1] == ["a", same, same, same, "**+0.110 [+0.093, +0.127]**", same, same]
    assert differences[3][1] == ["a", same, same, same, "+0.000 [−0.169, +0.169]", "–", same]
    assert "for 1 of 11 intervals; if no setting changed anything, about 1 would" in text


def test_cg_captions_describe_the_weather_or_name_the_look(few_scenes, tmp_path):
    write_toy(tmp_path, num_real=2, num_cg=2)
    pairs = tmp_path / "data/cg"
    written = (pairs / "train/metadata.csv").read_text()
    for look in ("real", "real", "cg"):  # a study that is started again does it again
        caption_cg(pairs, look)
        header, *rows = (pairs / "train/metadata.csv").read_text().splitlines()
        assert header == "file_name,control_name,text"
        caption = city.caption(city.make_scene(2_000_001), look)
        assert rows[1] == f'2000001_fine.mp4,2000001_coarse.mp4,"{caption}"'
    assert (pairs / "train/metadata.csv").read_text().splitlines() == written.splitlines()
    assert "cg render" in written
