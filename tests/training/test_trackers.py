"""The trackers of --report_to: what a tiny run writes to each, read back, also after a resume."""

import json
import shutil
import sqlite3
import struct
from collections import Counter

import pytest

from c2r import InputError
from c2r.options import training_checks
from tests.helpers.commands import images, phase1, phase2, scalars, succeed
from tests.helpers.forks import fork
from tests.helpers.options import options

#: Texts of the held-out real clips, which are the samples' prompts.
CAPTIONS = {"a street", "the city at night", "red brick", "rain", "two people on a street"}
SAMPLES = {"samples/sheet", "samples/0", "samples/1"}


@pytest.fixture(scope="module")
def tracked(first, tiny_models, small_datasets, tmp_path_factory):
    """A phase 2 of four steps on all trackers, killed after step 4 as it were, and resumed at step 2."""
    out = tmp_path_factory.mktemp("tracked") / "run"
    command = phase2(
        tiny_models,
        small_datasets,
        first[0] / "final",
        out,
        *("--max_train_steps=4", "--sample_steps=2", "--report_to", "tensorboard", "wandb", "trackio"),
        "--resume_from_checkpoint=latest",
    )
    environment = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(out.with_name("trackio"))}
    succeed(*command, by=fork, **environment)
    shutil.rmtree(out / "checkpoint-4")
    done = succeed(*command, by=fork, **environment)
    assert "resumed from" in done.stdout
    return out


def numbers_of(out):
    """Return {name: {step: value}} of a run's record."""
    numbers = {}
    for line in (out / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            if name not in ("step", "media", "caption", "train/samples_per_second"):  # the last one is measured
                assert entry["step"] not in numbers.setdefault(name, {}), f"{name} twice"
                numbers[name][entry["step"]] = value
    return numbers


def wandb_records(path):
    """Yield the records of a .wandb file: a log of LevelDB's format, in blocks of 32 KiB."""
    data, position, record = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if (room := 32768 - position % 32768) < 7:
            position += room
            continue
        length, kind = struct.unpack("<HB", data[position + 4 : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def offline_wandb(out):
    """Return the run ids, the config and the rows that wandb would upload from a folder."""
    from wandb.proto.wandb_internal_pb2 import Record

    ids, config, rows = set(), {}, []
    for path in sorted(out.glob("wandb/offline-run-*/run-*.wandb")):
        for data in wandb_records(path):
            record = Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
            config |= {item.key: json.loads(item.value_json) for item in record.config.update if item.key}
            if record.HasField("history"):
                rows.append({})
                for item in record.history.item:  # a picture or video has several entries
                    *outer, name = item.nested_key or [item.key]
                    entries = rows[-1].setdefault(outer[0], {}) if outer else rows[-1]
                    entries[name] = json.loads(item.value_json)
    return ids, config, rows


def test_the_record_has_every_number_once(tracked):
    numbers = numbers_of(tracked)
    assert [*numbers["train/loss"]] == [1, 2, 3, 4]
    assert [*numbers["validation/control_gain"]] == [0, 2, 4]
    assert [*numbers["train/cg_share"]] == [1, 2, 3, 4]
    validations = [json.loads(line) for line in (tracked / "validations.jsonl").read_text().splitlines()]
    assert [entry["step"] for entry in validations] == [0, 2, 4]


def test_tensorboard_has_the_same_numbers(tracked):
    numbers = numbers_of(tracked)
    logged = scalars(tracked)
    assert logged.keys() == {*numbers, "train/samples_per_second"}
    for name, values in numbers.items():
        assert logged[name] == pytest.approx([*values.values()], nan_ok=True)
    assert images(tracked) == {"validation": 2} | dict.fromkeys(SAMPLES, 2)
    assert not [path for path in (tracked / "logs").iterdir() if path.is_dir()], "more runs in TensorBoard than one"


def test_wandb_offline_has_the_same_numbers(tracked):
    ids, config, rows = offline_wandb(tracked)
    assert ids == {json.loads((tracked / "trackers.json").read_text())["wandb"]}
    assert (config["max_train_steps"], config["cg_ratio"]) == (4, 0.25)
    numbers, found = numbers_of(tracked), Counter(name for row in rows for name in row)
    for name, values in numbers.items():
        assert {row["global_step"]: row[name] for row in rows if name in row} == values
        assert found[name] == len(values)
    assert {name: found[name] for name in SAMPLES} == dict.fromkeys(SAMPLES, 2)
    videos = [row["samples/0"] for row in rows if "samples/0" in row]
    for video in videos:
        assert video["_type"] == "video-file"
        assert video["caption"] in CAPTIONS
        (file,) = tracked.glob(f"wandb/offline-run-*/files/{video['path']}")
        assert file.read_bytes()[4:8] == b"ftyp"


def test_trackio_has_the_same_numbers(tracked):
    folder = tracked.with_name("trackio")
    database = sqlite3.connect(folder / "c2r.db")
    rows = database.execute("SELECT run_name, step, metrics FROM metrics ORDER BY step").fetchall()
    assert {run for run, *_ in rows} == {json.loads((tracked / "trackers.json").read_text())["trackio"]}
    numbers, found = numbers_of(tracked), {}
    for _, step, metrics in rows:
        for name, value in json.loads(metrics).items():
            assert step not in found.setdefault(name, {}), f"{name} twice"
            found[name][step] = value
    assert {name: found[name] for name in numbers} == numbers
    for name in SAMPLES:
        assert [*found[name]] == [2, 4]
    video = found["samples/0"][4]
    assert video["_type"] == "trackio.video"
    assert video["caption"] in CAPTIONS
    assert (folder / "media" / video["file_path"]).read_bytes()[4:8] == b"ftyp"


def test_a_missing_package_is_refused_before_anything_loads(monkeypatch):
    find_spec = training_checks.find_spec
    monkeypatch.setattr(training_checks, "find_spec", lambda name: None if name == "wandb" else find_spec(name))
    with pytest.raises(InputError, match=r"--report_to tensorboard wandb: needs wandb; pip install wandb=="):
        options(["--report_to", "tensorboard", "wandb"])
    assert training_checks.chosen_trackers(["all"]) == ["tensorboard", "trackio"]


def test_a_missing_login_is_refused_before_anything_is_encoded(tiny_models, small_datasets, tmp_path):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    command = phase1(tiny_models, small_datasets, tmp_path / "out", "--report_to=wandb", "--height=48")
    done = fork(*command, **environment)
    assert done.returncode == 1
    assert (
        "--report_to wandb: this machine is not logged in; run wandb login, or set WANDB_MODE=offline" in done.stderr
    )
    assert "encoding" not in done.stdout


def test_none_excludes_the_other_trackers():
    with pytest.raises(InputError, match="--report_to none wandb: none excludes the others"):
        options(["--report_to", "none", "wandb"])
    assert training_checks.chosen_trackers(options(["--report_to", "none"]).report_to) == []
