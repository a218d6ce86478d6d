"""Finding a model in a folder or on the hub: what is downloaded, one line for each error, fingerprints of files."""

from pathlib import Path

import huggingface_hub.errors as hub_errors
import pytest

from c2r.files import fingerprint
from c2r.models import hub
from c2r.models.backbone import fingerprint_transformer
from c2r.models.hub import fingerprint_files, resolve_model_folder
from tests.helpers.checks import refusal
from tests.helpers.tiny import tiny_transformer


def test_a_local_folder_resolves_to_itself(pipeline):
    assert resolve_model_folder(pipeline) == resolve_model_folder(str(pipeline), ["vae", "transformer"]) == pipeline


def test_wrong_paths_are_refused_without_the_network(pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    Path("outputs").mkdir()
    for path in ("outputs/phase1", "./some/model", "/no/such/model", "model", tmp_path / "nothing"):
        assert refusal(resolve_model_folder, path) == f"{path}: no such model folder; check the path"
    assert "has no image_encoder/" in refusal(resolve_model_folder, pipeline, ["image_encoder"])
    assert "this is a file" in refusal(resolve_model_folder, pipeline / "model_index.json")


def test_only_the_needed_parts_of_a_hub_model_are_downloaded_and_no_pickle(pipeline, monkeypatch):
    calls = []
    monkeypatch.setattr(hub, "snapshot_download", lambda *args, **options: calls.append((args, options)) or pipeline)
    assert resolve_model_folder("Wan-AI/Wan2.1", ["vae"]) == pipeline
    (args, options) = calls[0]
    assert args == ("Wan-AI/Wan2.1",)
    assert options["allow_patterns"] == ["*.json", "vae/*"]
    assert {"*.bin", "*.pt", "*.pth"} <= set(options["ignore_patterns"])


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (hub_errors.GatedRepoError, "access to these weights is restricted; ask for it at https://huggingface.co/a/b"),
        (hub_errors.RepositoryNotFoundError, "no local folder and no Hugging Face model has this name"),
        (hub_errors.LocalEntryNotFoundError, "cannot be fetched from the Hugging Face hub (first line)"),
    ],
)
def test_errors_of_the_hub_become_one_line(monkeypatch, error, message):
    class Refused(error):
        def __init__(self):
            Exception.__init__(self, "first line\nsecond line")

    def refuse(*args, **options):
        raise Refused

    monkeypatch.setattr(hub, "snapshot_download", refuse)
    assert message in refusal(resolve_model_folder, "a/b")


@pytest.mark.parametrize("max_shard_size", ["10GB", "20KB"])
def test_files_and_model_have_the_same_fingerprint(tmp_path, max_shard_size):
    model = tiny_transformer()
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (max_shard_size == "20KB")
    assert fingerprint_files(tmp_path) == fingerprint(model.state_dict())
    assert fingerprint_transformer(tmp_path) == fingerprint(model.state_dict())
