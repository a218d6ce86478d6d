"""The runs of the study, and its results."""

from pathlib import Path

import pytest

from c2r import cli
from c2r.options import PHASE2
from c2r.toy import city
from c2r.toy.folder import write_toy
from c2r.toy.study_results import (
    MEASURES,
    Result,
    draw_control,
    draw_remedies,
    print_table,
    read_results,
    values_of,
    write_results,
)
from c2r.toy.study_runs import OPTIONS, RATIOS, caption_cg_like_real, planned_runs

PUBLISHED = Path(__file__).parents[2] / "docs/study/results.csv"


def some_results(*names):
    values = dict.fromkeys(MEASURES, 0.25) | {"cg_texture": None}
    return [Result(name, seed, values, seconds=7) for name in names for seed in (0, 1)]


@pytest.mark.parametrize("run", planned_runs(), ids=lambda run: run.name)
def test_every_planned_run_is_a_valid_command(run, tmp_path):
    options = OPTIONS | run.options
    required = ["--resume_backbone_from=b", "--real_dataset=r", "--cg_dataset=c", f"--output_dir={tmp_path}"]
    args = cli.parse(PHASE2, [*(f"--{name}={value}" for name, value in options.items()), *required])
    assert {name: getattr(args, name) for name in options} == options


def test_published_results_are_of_the_planned_runs():
    published, planned = {result.run for result in read_results(PUBLISHED)}, {run.name for run in planned_runs()}
    assert published <= planned
    # Settings that the next study measures.
    assert all("projection" in name or "directions" in name for name in planned - published)


def test_results_are_read_as_they_were_written(tmp_path):
    assert read_results(tmp_path / "results.csv") == []
    results = some_results("cg 0.1", "cg 0.5, controller")
    write_results(tmp_path / "results.csv", results)
    assert read_results(tmp_path / "results.csv") == results
    assert values_of(results, "cg 0.1", "loss") == [0.25, 0.25]
    assert values_of(results, "cg 0.1", "cg_texture") == []
    write_results(tmp_path / "results.csv", read_results(PUBLISHED))
    assert (tmp_path / "results.csv").read_bytes() == PUBLISHED.read_bytes()


def test_an_unfinished_study_is_drawn_and_printed(tmp_path, capsys):
    results = some_results("cg 0.1", "cg 0.5", "cg 0.5, no phase 1")
    draw_control(tmp_path / "control.png", results, RATIOS)
    draw_remedies(tmp_path / "remedies.png", results, [run.name for run in planned_runs()])
    for picture in ("control.png", "remedies.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    print_table(results, [run.name for run in planned_runs()])
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_cg_captions_describe_the_weather(tmp_path):
    write_toy(tmp_path, num_real=2, num_cg=2)
    metadata = tmp_path / "data/cg/train/metadata.csv"
    assert "cg render" in metadata.read_text()
    for _ in range(2):  # a study that is started again does it again
        caption_cg_like_real(tmp_path / "data/cg")
        header, *rows = metadata.read_text().splitlines()
        assert header == "file_name,control_name,text"
        caption = city.caption(city.make_scene(2_000_001))
        assert rows[1] == f'2000001_fine.mp4,2000001_coarse.mp4,"{caption}"'
