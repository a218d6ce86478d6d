"""The page of runs: self-contained, with every sample, and with paired differences that equal a direct computation."""

import copy
import fcntl
import json
import os
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from c2r import InputError
from c2r.evaluation.validation import LEAK_BOUND
from c2r.reporting import comparison, run_curves, run_folder
from c2r.reporting.page import report_page
from c2r.reporting.pairs import Difference, common_steps, difference
from c2r.reporting.run_folder import RunFolder, run_names
from c2r.reporting.sample_videos import chosen_videos
from tests.helpers.browser import needs_chromium, started_browser
from tests.helpers.commands import succeed
from tests.helpers.forks import fork


class Elements(HTMLParser):
    """Collect all elements with their attributes, and the text; fail on an element that is not closed."""

    VOID = ("meta", "line", "path", "circle", "polygon", "br")

    def __init__(self, text):
        super().__init__()
        self.found, self.text, self._open = [], [], []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] not in ("style", "script"):
            self.text.append(data)


def require_self_contained(elements):
    """Fail if an element or style refers to something outside of the page."""
    for tag, attributes in elements.found:
        assert tag not in ("link", "iframe", "object", "embed", "base", "img")
        for name, value in attributes.items():
            if name in ("src", "href", "poster", "srcset", "action", "data"):
                assert value.startswith(("data:", "#")), f"<{tag} {name}={value[:60]}>"
            assert not name.startswith("on")


@pytest.fixture(scope="module")
def runs(second, tmp_path_factory):
    """The folders of two runs: a finished one, and a copy of it with other losses."""
    folder = tmp_path_factory.mktemp("report")
    for name in ("a", "b"):
        shutil.copytree(second[0], folder / name)
    path = folder / "b/validations.jsonl"
    generator, lines = np.random.default_rng(0), []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        for table in entry["losses"].values():
            for row in table:
                row[:] = [loss and loss - 0.01 + 0.01 * generator.normal() for loss in row]
        entry["clips"].reverse()  # pairs are found by clip, not by row
        for table in entry["losses"].values():
            table.reverse()
        lines.append(json.dumps(entry))
    path.write_text("\n".join(lines) + "\n")
    return [RunFolder.read(folder / name, name) for name in ("a", "b")]


def test_the_page_has_every_sample_and_loads_nothing(runs):
    text = report_page(runs)
    elements = Elements(text)
    require_self_contained(elements)
    assert "http" not in re.sub(r'"http://www.w3.org/2000/svg"', "", text)
    videos = [attributes["src"] for tag, attributes in elements.found if tag == "video"]
    assert len(videos) == 2 * 2  # samples of the last step, of both runs
    assert {len(run.videos[4]) for run in runs} == {2}
    assert sorted(runs[0].captions) == ["samples/0", "samples/1"]
    assert all(prompt in elements.text for prompt in runs[0].captions.values())
    charts = [json.loads(attributes["data-chart"]) for _, attributes in elements.found if "data-chart" in attributes]
    lines = {line["label"]: line["points"] for chart in charts for line in chart["lines"]}
    for label, name in (("a: right conditions", "loss"), ("a, held-out clips", "loss_as_trained")):
        assert lines[label] == [[step, value] for step, value in runs[0].numbers[f"validation/{name}"].items()]


def test_paired_differences_equal_a_direct_computation(runs):
    a, b = runs
    assert common_steps(a, b) == [0, 2, 4]
    first, last = a.validations[4], b.validations[4]
    order = [[clip["key"] for clip in last["clips"]].index(clip["key"]) for clip in first["clips"]]
    real = np.array([clip["domain"] == "real" for clip in first["clips"]])

    def expected(table_a, table_b, rows=slice(None)):
        differences = (np.array(table_b)[order] - np.array(table_a)).mean(1)
        means = [differences[chosen].mean() for chosen in (real, ~real)]
        errors = [differences[chosen].std(ddof=1) / np.sqrt(chosen.sum()) for chosen in (real, ~real)]
        return np.mean(means), np.hypot(*errors) / 2

    found = difference(first, last)
    assert (found.mean, found.error) == pytest.approx(expected(first["losses"]["right"], last["losses"]["right"]))
    assert found.clips == 4
    gains = [np.array(e["losses"]["other_control"]) - np.array(e["losses"]["right"]) for e in (first, last)]
    found = difference(first, last, "other_control", "right")
    assert (found.mean, found.error) == pytest.approx(expected(*gains))
    shown = f"{abs(difference(first, last).mean):.3g}"[:5]
    assert f"b below a by {shown}" in "".join(Elements(report_page(runs)).text)
    # Not only where both runs are equal does the mean of the differences equal the difference of the means.
    metrics = [
        sum(np.mean(np.array(e["losses"]["right"])[r]) for r in rows) / 2
        for e, rows in ((first, (real, ~real)), (last, (real[np.argsort(order)], ~real[np.argsort(order)])))
    ]
    assert difference(first, last).mean == pytest.approx(metrics[1] - metrics[0])


def test_losses_of_clips_give_the_validation_loss_that_was_logged(runs):
    for step, entry in runs[0].validations.items():
        by_domain = {}
        for clip, row in zip(entry["clips"], entry["losses"]["right"]):
            by_domain.setdefault(clip["domain"], []).append(np.mean(row))
        mean = np.mean([np.mean(losses) for losses in by_domain.values()])
        assert mean == pytest.approx(runs[0].numbers["validation/loss"][step])


def test_other_clips_or_noise_levels_are_not_compared(runs, tmp_path):
    for change in (
        lambda entry: [clip.update(key="other") for clip in entry["clips"]],
        lambda entry: entry.update(sigmas=[0.1, 0.2, 0.3, 0.4]),
    ):
        other = shutil.copytree(runs[0].path, tmp_path / "other", dirs_exist_ok=True)
        lines = [json.loads(line) for line in (runs[0].path / "validations.jsonl").read_text().splitlines()]
        for entry in lines:
            change(entry)
        (other / "validations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
        text = "".join(Elements(report_page([runs[0], RunFolder.read(other, "other")])).text)
        assert "No paired comparison is possible" in text


@pytest.mark.parametrize("change", [lambda losses: losses.pop("right"), lambda losses: None])
def test_a_validation_without_losses_is_no_common_step(runs, tmp_path, change):
    other = shutil.copytree(runs[0].path, tmp_path / "other")
    lines = [json.loads(line) for line in (other / "validations.jsonl").read_text().splitlines()]
    for entry in lines:
        change(entry["losses"])
        if "right" in entry["losses"]:
            entry["losses"]["right"] = [[None] * 4 for _ in entry["clips"]]
    (other / "validations.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    text = "".join(Elements(report_page([runs[0], RunFolder.read(other, "other")])).text)
    assert "No paired comparison is possible" in text


def test_equal_runs_are_called_equal(runs):
    a = runs[0]
    again = RunFolder.read(a.path, "again")
    assert "again and a are equal at step 4, the last at which both validated (4 clips)." in "".join(
        Elements(report_page([a, again])).text
    )
    verdict = comparison._verdict(a, again, Difference(0.5, float("nan"), 1), 4)
    assert "(1 clip)" in verdict


def test_a_run_that_holds_its_lock_is_running(runs, tmp_path):
    out = shutil.copytree(runs[0].path, tmp_path / "run")
    shutil.rmtree(out / "final")
    os.utime(out / "metrics.jsonl", (0, 0))
    resume = "--resume_from_checkpoint latest"
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run = RunFolder.read(out, "run")
        assert run.status == "running, step 4 of 4"
        assert "to continue" not in report_page([run])
    run = RunFolder.read(out, "run")
    assert run.status == "stopped at step 4 of 4"
    assert "to continue" in report_page([run])
    assert resume in report_page([run])
    with open(out / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # reading has left no lock


def test_losses_that_would_fill_the_memory_are_not_read(runs, tmp_path):
    out = shutil.copytree(runs[0].path, tmp_path / "run")
    os.truncate(out / "validations.jsonl", run_folder.MAX_VALIDATIONS_BYTES + 1)
    run = RunFolder.read(out, "run")
    assert run.validations == {}
    assert "run has no validations.jsonl of at most 200 MB" in "".join(Elements(report_page([run])).text)


def test_wrong_conditions_are_compared_where_both_runs_have_the_same(runs):
    first = runs[0].validations[4]
    assert all({"other_control", "other_prompt"} <= clip.keys() for clip in first["clips"])
    second = copy.deepcopy(first)
    second["clips"][0]["other_control"] = "of another clip"
    second["losses"]["other_control"][0] = [9.0] * 4
    for arguments in ({"condition": "other_control"}, {"condition": "other_control", "against": "right"}):
        found = difference(first, second, **arguments)
        assert (found.mean, found.clips) == (0, 3)
    assert difference(first, second).clips == difference(first, second, "other_prompt").clips == 4
    assert "differ: rows with such a condition" in comparison._wrong_conditions_note(first, second)
    assert comparison._wrong_conditions_note(first, first) == ""


def test_a_folder_with_little_in_it_says_what_is_missing(runs, tmp_path):
    shutil.copy(runs[0].path / "metrics.jsonl", tmp_path)
    run = RunFolder.read(tmp_path, "little")
    assert [line.partition(":")[0] for line in run.missing] == ["run.json", "validations.jsonl", "samples/"]
    text = "".join(Elements(report_page([run])).text)
    assert "little has no run.json: options, versions and the command are unknown." in text
    with pytest.raises(InputError, match="no such folder"):
        RunFolder.read(tmp_path / "none", "none")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"holds no run.json, metrics.jsonl or samples/"):
        RunFolder.read(tmp_path / "empty", "empty")


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("[1]", "line 1: "),
        ('{"loss": 1}', "line 1: has no step"),
        ('{"step": -1}', "line 1: has no step"),
        ("{" * 100_000, "line 1: "),
        (f'{{"step": {10**400}}}', "line 1: has no step"),
        ("x" * (run_folder.MAX_LINE_BYTES + 1), "longer than"),
        (json.dumps({"step": 1} | {str(i): 1 for i in range(2000)}), "more than 1000 names"),
    ],
)
def test_damaged_numbers_are_refused_in_one_line(tmp_path, line, problem):
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(InputError, match=re.escape(problem)) as error:
        RunFolder.read(tmp_path, "damaged")
    assert "\n" not in str(error.value)


def test_numbers_that_cannot_be_drawn_count_as_not_finite(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "train/loss": {10**400}, "train/grad_norm": 1e300}}\n')
    run = RunFolder.read(tmp_path, "large")
    assert np.isnan([run.numbers["train/loss"][1], run.numbers["train/grad_norm"][1]]).all()
    assert "Training loss" not in report_page([run])


def test_options_of_another_type_do_not_end_the_report(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path, dirs_exist_ok=True)
    start = json.loads((tmp_path / "run.json").read_text())
    for value in (["x"], {"y": [1]}, "text", 1e300, None, True):
        start["options"] = dict.fromkeys(start["options"], value)
        (tmp_path / "run.json").write_text(json.dumps(start))
        require_self_contained(Elements(report_page([RunFolder.read(tmp_path, "odd"), *runs])))


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2}\n{"step": 2, "train/lo')
    assert RunFolder.read(tmp_path, "running").numbers == {"train/loss": {1: 2.0}}


def test_text_from_files_cannot_become_html(runs, tmp_path):
    shutil.copytree(runs[0].path, tmp_path, dirs_exist_ok=True)
    start = json.loads((tmp_path / "run.json").read_text())
    hostile = "</script><script>alert(1)</script><img src=http://x onerror=alert(1)>"
    start["options"][hostile] = start["options"]["output_dir_of"] = hostile
    start["environment"][hostile] = start["command"] = start["resume"] = start["started"] = hostile
    (tmp_path / "run.json").write_text(json.dumps(start))
    elements = Elements(report_page([RunFolder.read(tmp_path, hostile)]))
    require_self_contained(elements)
    assert [tag for tag, _ in elements.found].count("script") == 1


def test_links_in_a_folder_are_not_followed(runs, tmp_path):
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples/step-1").symlink_to(runs[0].path / "samples/step-4")
    (tmp_path / "metrics.jsonl").symlink_to(runs[0].path / "metrics.jsonl")
    with pytest.raises(InputError, match="holds no"):
        RunFolder.read(tmp_path, "links")


def test_videos_that_do_not_fit_are_left_out_by_step_and_then_by_sample(tmp_path):
    for step in (10, 20, 30, 40, 50):
        for sample in range(3):
            path = tmp_path / f"samples/step-{step}/{sample}.mp4"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"x" * 100)
    run = RunFolder.read(tmp_path, "videos")
    run.numbers["validation/loss"] = {10: 3.0, 30: 1.0, 50: 2.0}
    (all_of_them,), note = chosen_videos([run], 1500)
    assert ([*all_of_them], note) == ([10, 20, 30, 40, 50], "")
    (some,), note = chosen_videos([run], 1000)
    assert [*some] == [10, 30, 50]
    assert note == "All videos would take 1.50 kB, so the first, the best and the last step of each run are shown."
    (fewer,), note = chosen_videos([run], 650)
    assert {step: [*row] for step, row in fewer.items()} == {10: [0, 1], 30: [0, 1], 50: [0, 1]}
    assert note.endswith("of each run are shown, and 2 samples of each.")


def test_names_of_runs_tell_them_apart():
    assert run_names(["out/a", "out/b"]) == ["a", "b"]
    assert run_names(["x/phase2", "y/phase2"]) == ["x/phase2", "y/phase2"]


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_works_in_a_browser_without_a_network(runs, tmp_path, width):
    run = RunFolder.read(runs[0].path, "a")
    run.videos = {2: run.videos[4], 4: run.videos[4]}
    path = tmp_path / "page.html"
    path.write_text(report_page([run, runs[1]]))
    problems = []
    with started_browser() as browser:
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.on("console", lambda message: problems.append(message.text))
        tab.on("pageerror", lambda error: problems.append(str(error)))
        tab.on("request", lambda sent: problems.append(sent.url) if not sent.url.startswith(("file:", "data:")) else 0)
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        for step in (2, 4):
            tab.locator(f".steps button[data-step='{step}']").click()
            steps = tab.locator(".sample:visible").evaluate_all("shown => shown.map(one => one.dataset.step)")
            assert set(steps) == {str(step)}
            assert tab.locator("button[aria-pressed=true]").get_attribute("data-step") == str(step)
        tab.wait_for_function(
            "[...document.querySelectorAll('.sample:not([hidden]) video')].some(v => v.readyState >= 2)"
        )
    assert problems == []


def test_the_bound_of_the_leak_is_that_of_the_warning():
    assert run_curves.LEAK_BOUND == LEAK_BOUND


def test_the_command_writes_the_page(first, second, tmp_path):
    output = tmp_path / "page.html"
    done = succeed("-m", "c2r.report", first[0], second[0], "--output", output, by=fork)
    assert f"{output}: " in done.stdout
    require_self_contained(Elements(output.read_text()))
    failed = fork("-m", "c2r.report", tmp_path / "none")
    assert failed.returncode == 1
    assert failed.stderr.count("\n") == 1
    assert "none: no such folder" in failed.stderr
