"""Files that a stranger has made do no harm: nothing outside is changed, and each fault is one line."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2r import InputError, cli
from c2r.data.manifest import read_manifest
from c2r.data.video_writer import write_video
from c2r.files import MAX_JSON_BYTES, atomic_folder, read_json, refuse_linked_folders, remove_tree
from c2r.generate import output_paths
from c2r.models.assembly import read_transformer_config
from c2r.options import PHASE1
from c2r.training.resume import find_checkpoint, list_checkpoints, lock_output_dir
from tests.helpers.datasets import noise_video, write_dataset
from tests.helpers.runs import build_run, load, save, train_one_step
from tests.helpers.settings import clip_settings


@pytest.fixture
def outside(tmp_path):
    """Make a folder with a file that must survive."""
    folder = tmp_path / "outside"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner/file").write_text("precious")
    yield folder
    assert (folder / "inner/file").read_text() == "precious"
    assert sorted(path.name for path in folder.rglob("*")) == ["file", "inner"]


@pytest.mark.parametrize("place", [".c2r_cache", ".c2r_cache/metadata", ".c2r_cache/metadata/0123"])
def test_a_cache_that_a_dataset_ships_may_not_lead_out(place, outside, tmp_path):
    dataset = write_dataset(tmp_path / "dataset", ["a.mp4", "b.mp4"], ["a street", "rain"])
    (dataset / place).parent.mkdir(parents=True, exist_ok=True)
    (dataset / place).symlink_to(outside)
    with pytest.raises(InputError, match="a link in a cache; remove it, or give a --cache_dir"):
        read_manifest(dataset, "real", clip_settings())
    assert len(read_manifest(dataset, "real", clip_settings(cache_dir=tmp_path / "cache")).clips) == 4


def test_a_cache_of_folders_is_accepted(tmp_path):
    refuse_linked_folders(tmp_path / "missing")
    (tmp_path / "cache/clips/ab").mkdir(parents=True)
    (tmp_path / "cache/checked.safetensors").touch()
    refuse_linked_folders(tmp_path / "cache")


def test_nothing_is_removed_through_a_link(outside, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(outside)
    remove_tree(link)
    assert not link.is_symlink()
    for name in (".best.tmp", ".best.old", "best"):
        (tmp_path / name).symlink_to(outside)
    with atomic_folder(tmp_path / "best") as temporary:
        (temporary / "weights").write_text("new")
    assert (tmp_path / "best/weights").read_text() == "new"
    assert not (tmp_path / "best").is_symlink()


def test_a_linked_checkpoint_is_none_and_a_linked_lock_empties_no_file(outside, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "checkpoint-5").symlink_to(outside)
    assert list_checkpoints(out) == []
    assert find_checkpoint(out, "latest") == (None, [])
    (out / ".lock").symlink_to(outside / "inner/file")
    with pytest.raises(InputError, match=r"cannot be written"):
        lock_output_dir(build_run(tmp_path / "run").run.accelerator, out)


def test_a_video_is_not_written_through_a_prepared_link(outside, tmp_path):
    for name in (".a.partial.mp4", "a.mp4"):
        (tmp_path / name).symlink_to(outside / "inner/file")
    write_video(tmp_path / "a.mp4", noise_video(0), 8)
    assert not (tmp_path / "a.mp4").is_symlink()
    assert [path.name for path in tmp_path.glob("*.partial.mp4")] == [".a.partial.mp4"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {"0.exp_avg": tensors["0.exp_avg"][:1].clone()}, "0.exp_avg has shape"),
        (lambda tensors: tensors | {"9999.exp_avg": torch.zeros(1)}, "unknown state 9999.exp_avg"),
        (lambda tensors: tensors | {"x.exp_avg": torch.zeros(1)}, "unknown state x.exp_avg"),
    ],
)
def test_moments_of_another_shape_are_refused(change, message, tmp_path):
    built = build_run(tmp_path / "out")
    train_one_step(built)
    save(built)
    checkpoint = tmp_path / "out/checkpoint-1"
    file = checkpoint / "optimizer-00000-of-00001.safetensors"
    save_file(change(load_file(file)), file, metadata={"numbers": "{}"})
    with pytest.raises(InputError, match=message):
        load(build_run(tmp_path / "resumed", checkpoint=checkpoint))


@pytest.mark.parametrize("sizes", [{"num_layers": 10**9}, {"ffn_dim": "many"}, {"attention_head_dim": -1}])
def test_a_config_of_impossible_size_is_refused_at_once(sizes, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models / "pipeline/transformer", tmp_path / "transformer")
    config = json.loads((folder / "config.json").read_text()) | sizes
    (folder / "config.json").write_text(json.dumps(config))
    (name,) = sizes
    with pytest.raises(InputError, match=f"entry {name}: Input should be .*, not {sizes[name]!r}"):
        read_transformer_config(folder)


def test_json_of_any_kind_ends_in_one_line(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("[" * 200_000)
    with pytest.raises(InputError, match=r"not valid JSON.*recursion limit"):
        read_json(path)
    with open(path, "wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)  # sparse
    with pytest.raises(InputError, match="larger than"):
        read_json(path)
    os.mkfifo(tmp_path / "fifo.json")  # reading it would wait without end
    with pytest.raises(InputError, match="not a file"):
        read_json(tmp_path / "fifo.json")


def test_a_config_that_is_no_ordinary_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "fifo.yaml")
    for path in (tmp_path / "fifo.yaml", "/dev/zero", tmp_path / "missing.yaml"):
        with pytest.raises(InputError, match="no such file; give a YAML file"):
            cli.parse(PHASE1, [f"--config={path}"])
    with open(tmp_path / "huge.yaml", "wb") as file:
        file.truncate(10**10)  # sparse
    with pytest.raises(InputError, match="larger than"):
        cli.parse(PHASE1, [f"--config={tmp_path / 'huge.yaml'}"])


@pytest.mark.parametrize("text", ["a\nerror: b", "\x1b[2Kdone", "a\u202eb", "a\rb", "a\x07"])
def test_a_message_cannot_be_forged(text, capsys, signal_handlers):
    def main():
        raise InputError(f"{text}.mp4: unreadable")

    if "\n" not in text:  # of several lines the last one is the message
        with pytest.raises(SystemExit) as ended:
            cli.run(main)
        assert str(ended.value).isprintable()
    cli.logging.getLogger("c2r").info(text)
    (line,) = capsys.readouterr().out.rstrip("\n").split("\n")
    assert line.isprintable()


def test_ordinary_text_is_printed_as_it_is():
    text = "Straße, 東京: „ok“, [0.55, 0.70]"
    assert cli.printable(text) == text


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_generated(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    assert output_paths(str(tmp_path / "a.mp4"), 1, []) == [tmp_path / "a.mp4"]
    for name in ("folder.mp4", "x" * 253 + ".mp4"):
        with pytest.raises(InputError, match="cannot be written"):
            output_paths(str(tmp_path / name), 1, [])
    assert [path.name for path in tmp_path.iterdir()] == ["folder.mp4"]
