"""Files that a stranger has made do no harm: nothing outside is changed, and each fault is one line."""

import json
import os
import shutil
import time
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file, save_file

from c2r import InputError, cli
from c2r.data.failures import noted_failures
from c2r.data.manifest import read_manifest
from c2r.data.remote import RemoteFolder
from c2r.data.video_writer import write_video
from c2r.files import (
    MAX_JSON_BYTES,
    atomic_folder,
    load_tensors,
    read_json,
    refuse_linked_folders,
    remove_tree,
    save_tensors,
)
from c2r.generate import output_paths
from c2r.models.backbone import read_transformer_config
from c2r.models.contract import read_contract
from c2r.models.dinov3 import check_dinov3
from c2r.models.hub import REFUSED_ENTRIES, WeightIndex
from c2r.models.parts import ENCODERS, check_pipeline_parts, load_pipeline_part
from c2r.options import PHASE1
from c2r.toy.folder import read_toy
from c2r.training.resume import find_checkpoint, list_checkpoints, lock_output_dir
from c2r.training.state_file import read_state
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


MOMENT = "model.control_adapter.norm.bias:0:exp_avg"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors | {MOMENT: tensors[MOMENT][:1].clone()}, "exp_avg of .* does not have 32 elements"),
        (lambda tensors: tensors | {MOMENT: tensors[MOMENT].repeat(2)}, "exp_avg of .* does not have 32 elements"),
        (lambda tensors: tensors | {MOMENT: tensors[MOMENT].view(2, 16)}, r"is F32 \(2, 16\), not flat fp32"),
        (lambda tensors: tensors | {MOMENT: tensors[MOMENT].half()}, r"is F16 \(32,\), not flat fp32"),
        (lambda tensors: {key: t for key, t in tensors.items() if key != MOMENT}, "does not have 32 elements"),
        (lambda tensors: {key: t for key, t in tensors.items() if not key.endswith(":step")}, "step of .* is missing"),
        (lambda tensors: tensors | {"x.exp_avg": torch.zeros(1)}, "unknown tensor x.exp_avg"),
    ],
)
def test_moments_of_another_shape_are_refused(change, message, tmp_path):
    built = build_run(tmp_path / "out")
    train_one_step(built)
    save(built)
    checkpoint = tmp_path / "out/checkpoint-1"
    file = checkpoint / "optimizer-00000-of-00001.safetensors"
    save_file(change(load_file(file)), file)
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


def linked_out(folder, outside):
    """Write a folder with a file and links that lead out of it."""
    folder.mkdir()
    (folder / "a.mp4").write_bytes(b"a")
    (folder / "inside.mp4").symlink_to("a.mp4")
    (folder / "file.mp4").symlink_to(outside / "inner/file")
    (folder / "folder").symlink_to(outside)
    return folder


@pytest.mark.parametrize("protocol", ["file", "local", "simplecache::file", "filecache::file", "blockcache::file"])
def test_no_link_leads_out_of_a_dataset_at_an_address(protocol, outside, tmp_path):
    folder = linked_out(tmp_path / "dataset", outside)
    files = RemoteFolder(f"{protocol}://{folder}", tmp_path / "cache", 1000).files
    assert sorted(files) == ["a.mp4", "inside.mp4"]


SHARDS = [
    "../other.safetensors",
    "/dev/zero",
    "x/../../a.safetensors",
    "pipe.safetensors",
    5,
    "a.bin",
]


@pytest.mark.parametrize("name", SHARDS)
def test_an_index_names_no_file_outside_its_folder(name, tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models / "pipeline/transformer", tmp_path / "transformer")
    file = folder / "diffusion_pytorch_model.safetensors"
    shutil.copy(file, tmp_path / "other.safetensors")
    os.mkfifo(folder / "pipe.safetensors")
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file.name}}))
    assert WeightIndex(folder).shapes()
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InputError, match=r"no such file|entry weight_map\.a: "):
        WeightIndex(folder)


def test_a_shard_in_the_hubs_cache_is_a_link_to_its_blobs(tiny_models, tmp_path):
    blobs, folder = tmp_path / "models--a--b/blobs", tmp_path / "models--a--b/snapshots/0123/transformer"
    blobs.mkdir(parents=True)
    folder.mkdir(parents=True)
    shutil.copy(tiny_models / "pipeline/transformer/diffusion_pytorch_model.safetensors", blobs / "4567")
    (folder / "a.safetensors").symlink_to("../../../blobs/4567")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "a.safetensors"}}')
    assert WeightIndex(folder).shapes()


def changed_config(file, **entries):
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


CONFIGS = ["vae/config", "text_encoder/config", "tokenizer/tokenizer_config", "dinov3/config"]


def all_parts(tiny_models, tmp_path, file, **entries):
    """Copy the tiny pipeline and DINOv3, and change entries of one JSON file; return the folder."""
    folder = shutil.copytree(tiny_models / "pipeline", tmp_path / "pipeline")
    shutil.copytree(tiny_models / "dinov3", folder / "dinov3")
    changed_config(folder / f"{file}.json", **entries)
    return folder


def check_all_parts(folder):
    check_dinov3(folder / "dinov3", [])
    check_pipeline_parts(folder, [*ENCODERS, "scheduler"])


@pytest.mark.parametrize(("file", "entry"), zip(CONFIGS, REFUSED_ENTRIES, strict=True))
def test_a_config_that_would_run_its_authors_code_is_refused(file, entry, tiny_models, tmp_path):
    folder = all_parts(tiny_models, tmp_path, file, **{entry: {"AutoTokenizer": ["a.b", None]}})
    with pytest.raises(InputError, match=f"has {entry}, which is not supported"):
        check_all_parts(folder)


def test_a_part_of_another_class_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models / "pipeline", tmp_path / "pipeline")
    changed_config(folder / "scheduler/scheduler_config.json", _class_name="StableDiffusionPipeline")
    changed_config(folder / "tokenizer/tokenizer_config.json", tokenizer_class="BertJapaneseTokenizer")
    for part in ("scheduler", "tokenizer"):
        with pytest.raises(InputError, match=r"class is .*, not one of .*; give th"):
            load_pipeline_part(folder, part)


@pytest.mark.parametrize(
    ("file", "entry", "size"),
    [
        *(("vae/config", name, 10**9) for name in ("num_res_blocks", "base_dim", "z_dim")),
        *(("text_encoder/config", name, 10**9) for name in ("num_layers", "d_model", "vocab_size")),
        *(("dinov3/config", name, 10**9) for name in ("num_hidden_layers", "hidden_size")),
        ("scheduler/scheduler_config", "num_train_timesteps", 10**9),
        *(("text_encoder/config", name, 90) for name in ("num_layers", "d_model", "vocab_size")),
        ("vae/config", "base_dim", 90),
        ("dinov3/config", "num_hidden_layers", 90),
    ],
)
def test_a_size_that_the_files_do_not_have_is_refused_at_once(file, entry, size, tiny_models, tmp_path):
    folder = all_parts(tiny_models, tmp_path, file, **{entry: size})
    started = time.process_time()
    with pytest.raises(InputError, match=f"entry {entry}: |its files have|weights are"):
        check_all_parts(folder)
    assert time.process_time() - started < 2


def test_a_pipe_or_device_in_a_model_folder_is_refused(tiny_models, tmp_path):
    folder = shutil.copytree(tiny_models / "pipeline", tmp_path / "pipeline")
    os.mkfifo(folder / "tokenizer/special_tokens_map.json")
    (folder / "vae/a.json").symlink_to("/dev/zero")
    for part in ("tokenizer", "vae"):
        with pytest.raises(InputError, match="neither a file nor a folder; remove it"):
            load_pipeline_part(folder, part)


@pytest.mark.parametrize("text", [r"\ud800", r"caf\udce9", r"a\0b"])
def test_text_that_cannot_be_a_path_is_refused(text, tmp_path):
    (tmp_path / "a.yaml").write_text(f'output_dir: "{text}"')
    with pytest.raises(InputError, match="is not valid UTF-8; rename the file"):
        cli.parse(PHASE1, [f"--config={tmp_path / 'a.yaml'}"])


def test_an_alias_that_stands_for_gigabytes_is_refused(tmp_path):
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    lines += [f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]" for a, b in pairwise("abcdefghij")]
    for text in ("\n".join([*lines, "prompt: *j"]), "seed: " + "[" * 20_000, "{a: " * 5000):
        (tmp_path / "a.yaml").write_text(text)
        started = time.monotonic()
        with pytest.raises(InputError, match=r"uses an alias \(\*name\) or nested lists"):
            cli.parse(PHASE1, [f"--config={tmp_path / 'a.yaml'}"])
        assert time.monotonic() - started < 2


def test_our_own_files_of_another_kind_name_the_entry(tmp_path):
    readers = {"c2r.json": read_contract, "state.json": read_state, "toy.json": read_toy}
    for name, read in readers.items():
        for text, problem in (("[]", "Input should be an object"), ("null", "Input"), ("NaN", "Input")):
            (tmp_path / name).write_text(text)
            with pytest.raises(InputError, match=rf"{name}: {problem}"):
                read(tmp_path)
    (tmp_path / "toy.json").write_text('{"height": "96", "width": 1, "num_frames": 1, "fps": 1e400, "test": []}')
    with pytest.raises(InputError, match=r"entry height: Input should be a valid integer, not '96', and 2 more; rep"):
        read_toy(tmp_path)


@pytest.mark.parametrize("note", ["[]", "{}", '{"file": [1, 2, 3]}', "null", "[" * 9999])
def test_a_damaged_note_of_a_failure_is_ignored_with_a_warning(note, tmp_path, capsys):
    (tmp_path / "failures").mkdir()
    (tmp_path / "failures/a.json").write_text(note)
    assert noted_failures(tmp_path, None) == {}
    assert "failures/a.json" in capsys.readouterr().out


def test_a_cached_clip_of_another_shape_is_damaged(outside, tmp_path):
    path = tmp_path / "a.safetensors"
    save_tensors(path, {"prompt_embeds": torch.zeros(1)}, {"max_sequence_length": 16})
    assert load_tensors(path, ["prompt_embeds"])[1]["max_sequence_length"] == 16
    with pytest.raises(InputError, match="this cached file is damaged; delete it"):
        load_tensors(path, ["latents"])
    save_file({"a": torch.zeros(1)}, path, metadata={"c2r": "["})
    with pytest.raises(InputError, match="this cached file is damaged; delete it"):
        load_tensors(path)


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
