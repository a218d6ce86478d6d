"""LPIPS: equal to torchmetrics' on the same network."""

import pytest
import torch
from torchmetrics.functional.image import lpips as reference

from c2r import InputError
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.perceptual import LPIPS, LPIPSNetwork
from tests.helpers.metric_networks import save_vgg16, vgg16_features


@pytest.fixture(scope="module")
def features():
    return vgg16_features()


@pytest.fixture(scope="module")
def folder(features, tmp_path_factory):
    return save_vgg16(tmp_path_factory.mktemp("vgg16"), features)


def test_it_is_that_of_torchmetrics(features, folder, monkeypatch):
    monkeypatch.setattr(reference, "_get_tv_model_features", lambda *_: features)  # else it needs torchvision
    frames, others = torch.rand(2, 3, 3, 48, 40)
    expected = reference._LPIPS(net="vgg")(frames, others, normalize=True).flatten()
    torch.testing.assert_close(LPIPSNetwork.from_pretrained(folder)(frames, others), expected)


def test_equal_videos_have_no_distance_and_own_scenes_a_smaller_one(folder, scenes):
    measure = LPIPS(folder, "cpu")

    def distance(video, truth):
        return measure(EvaluatedClip("a", "", video[:1, :, ::3, ::3], truth=truth[:1, :, ::3, ::3]))

    assert distance(scenes[0]["real"], scenes[0]["real"]) == 0
    own = [distance(one["cg"], one["real"]) for one in scenes[:2]]
    other = [distance(scenes[1 - i]["cg"], scenes[i]["real"]) for i in range(2)]
    assert sum(own) < sum(other)
    assert measure(EvaluatedClip("a", "", scenes[0]["real"])) is None


def test_missing_weights_are_named(features, tmp_path):
    short = save_vgg16(tmp_path / "short", features[:28])
    for device in ("cpu", "meta"):  # the second one reads no weights
        with pytest.raises(InputError, match=r"missing: features\.28\.bias, features\.28\.weight"):
            LPIPSNetwork.from_pretrained(short, device)
