"""Making measures by name, what is skipped, and folders of strangers."""

import json
import shutil

import pytest
from transformers import PreTrainedModel

from c2r import InputError
from c2r.metrics import registry
from c2r.metrics.catalogue import MEASURES, QUESTIONS, ROLES, question_of
from c2r.metrics.networks import Remembering
from c2r.models.hub import SafetensorsFile

NAMES = [measure.name for measure in MEASURES]


def test_every_measure_is_made_and_measures_a_clip(networks, small_clips):
    metrics, set_metrics, skipped = registry.make_metrics(NAMES, networks, "cpu")
    assert [one.name for one in skipped] == ["quality"]
    assert [metric.name for metric in metrics] == [m.name for m in MEASURES if not m.of_set and m.name != "quality"]
    assert [metric.name for metric in set_metrics] == ["fd_dinov2", "kd_dinov2", "kd_vjepa2"]
    clip = small_clips[0]
    for metric in metrics:
        assert metric.unit
        value = metric(clip)
        assert (value is None) == (metric.name == "depth_rmse_passes")  # the toy's renderings have no depth
        assert value is None or isinstance(value, float)
    for metric in set_metrics:
        for one in small_clips[:2]:
            metric.update(one)
        assert isinstance(metric.compute(), float)


def test_networks_are_checked_on_the_device_meta_without_reading_a_weight(networks, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", None)
    monkeypatch.setattr(SafetensorsFile, "tensor", None)
    metrics, set_metrics, _ = registry.make_metrics(NAMES, networks, "meta")
    assert [metric.name for metric in metrics] == [m.name for m in MEASURES if not m.of_set and m.name != "quality"]
    assert [metric.name for metric in set_metrics] == ["fd_dinov2", "kd_dinov2", "kd_vjepa2"]


def test_measures_of_one_network_share_it(networks):
    metrics, _, _ = registry.make_metrics(["depth_rmse", "depth_rmse_control"], networks, "cpu")
    assert metrics[0].inverse_depth is metrics[1].inverse_depth


def test_a_measure_without_its_network_or_package_is_skipped_by_name(monkeypatch):
    _, _, skipped = registry.make_metrics(["lpips", "fd"], {}, "cpu")
    assert [(one.name, one.reason) for one in skipped] == [
        (name, f"needs {ROLES[role]}; none is named") for name, role in (("lpips", "lpips"), ("fd", "image_features"))
    ]
    monkeypatch.setattr(registry, "find_spec", lambda package: None)
    metrics, _, skipped = registry.make_metrics(["edge_f1", "quality"], {"quality": "musiq"}, "cpu")
    assert not metrics
    assert skipped[0].reason.startswith("needs the package cv2; pip install opencv-python-headless==")
    assert skipped[1].reason.startswith("needs the package pyiqa; pip install pyiqa")


def test_unknown_names_and_roles_are_refused():
    with pytest.raises(ValueError, match="psnr: no such measure; choose from edge_f1, "):
        registry.make_metrics(["psnr"], {}, "cpu")
    with pytest.raises(ValueError, match="inception: no such role; choose from lpips, "):
        registry.make_metrics(["fd"], {"inception": "x"}, "cpu")


def change(path, **entries):
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("name", "entries", "message"),
    [
        ("config.json", {"model_type": "bert"}, "model type is bert, not one of dinov2, "),
        ("config.json", {"model_type": ["dinov2"]}, "model type is "),
        ("config.json", {"auto_map": {"AutoModel": "evil.Model"}}, "has auto_map, which is not supported"),
        ("config.json", {"x": [{"quantization_config": {}, "auto_map": "a"}]}, "has auto_map"),
        ("config.json", {"use_pretrained_backbone": True}, "has use_pretrained_backbone"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000, more than 100"),
        ("config.json", {"hidden_size": 10**9}, "hidden_size is 1000000000, more than 1000000"),
        ("config.json", {"hidden_size": 32}, "describes a model of"),
        ("preprocessor_config.json", {"crop_size": 10**9}, "crop_size"),
        ("preprocessor_config.json", {"image_std": [0, 1, 1]}, "image_std"),
        ("preprocessor_config.json", {"size_divisor": 3000}, "size_divisor is 3000, more than 2048"),
        ("preprocessor_config.json", {"pad_size": {"height": 3e3, "width": 1}}, "height is 3000.0, more than 2048"),
        ("preprocessor_config.json", {"x": [[{"pad": -(10**9)}]]}, "pad is -1000000000, more than 2048"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.P"}}, "has auto_map"),
    ],
)
def test_hostile_and_unfit_folders_are_refused_in_one_line(name, entries, message, networks, tmp_path):
    """Also by the check that reads no weights."""
    folder = tmp_path / "model"
    shutil.copytree(networks["image_features"], folder)
    change(folder / name, **entries)
    for device in ("cpu", "meta"):
        with pytest.raises(InputError) as caught:
            registry.make_metrics(["fd"], {"image_features": str(folder)}, device)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)


def test_pickles_and_missing_folders_are_refused(networks, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(networks["image_features"], folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    for given, message in ((folder, "has no safetensors weights"), (tmp_path / "none", "no such model folder")):
        for device in ("cpu", "meta"):
            with pytest.raises(InputError, match=message):
                registry.make_metrics(["fd"], {"image_features": str(given)}, device)


def test_results_of_three_videos_are_remembered(clips):
    seen = []

    def count(video):
        seen.append(video)
        return len(seen)

    remembering, videos = Remembering(count), [clip.video for clip in clips]
    assert [remembering(videos[i]) for i in (0, 1, 2, 1, 2, 0)] == [1, 2, 3, 2, 3, 1]
    assert remembering(videos[3]) == 4  # instead of the one that was used least lately
    assert remembering(videos[0]) == 1
    assert remembering(videos[1]) == 5


def test_quality_needs_a_measure_without_reference(tmp_path):
    pyiqa = pytest.importorskip("pyiqa")
    assert "musiq" in pyiqa.list_models(metric_mode="NR")
    with pytest.raises(InputError, match="psnr: pyiqa has no such measure without a reference"):
        registry.make_metrics(["quality"], {"quality": "psnr"}, "cpu")


def test_every_result_has_the_question_of_its_measure():
    assert {question_of(measure.name) for measure in MEASURES} | {question_of("cg_look")} == {*QUESTIONS.values()}
    for name, start in {"fd_dinov2": "fd", "kd_vjepa2": "kd", "mask_miou_control": "mask_miou"}.items():
        assert question_of(name) == QUESTIONS[start]
    assert question_of("mask_miou_passes") == QUESTIONS["mask_miou_passes"]
