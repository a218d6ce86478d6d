"""DINOv3FeatureExtractor against the model itself: normalised input, patch tokens only, always frozen."""

import json

import pytest
import torch
from transformers import DINOv3ViTConfig, DINOv3ViTModel

from c2r import InputError
from c2r.models.dinov3 import DINOv3FeatureExtractor, check_dinov3, read_dinov3_config
from tests.helpers.tiny import FEATURE_DIM, save_tiny_dinov3, tiny_dinov3

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_dinov3(tmp_path_factory.mktemp("dinov3"))


def frames(batch_size=2, num_frames=5, height=32, width=48):
    return torch.rand(batch_size, num_frames, 3, height, width, generator=torch.Generator().manual_seed(0))


def test_features_are_the_models_patch_tokens_of_normalised_frames():
    model = tiny_dinov3()
    control_frames = frames()
    features = DINOv3FeatureExtractor(model, MEAN, STD)(control_frames)
    assert features.shape == (2, 5, 2, 3, FEATURE_DIM)
    one = (control_frames[1, 3] - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        tokens = model(one[None]).last_hidden_state[0]
    assert tokens.shape[0] == 1 + 4 + 6  # class, registers, patches
    torch.testing.assert_close(features[1, 3].flatten(0, 1), tokens[5:], atol=1e-5, rtol=1e-5)


def test_rows_of_the_grid_are_rows_of_the_picture():
    model = tiny_dinov3()
    model.model.layer = torch.nn.ModuleList()  # without attention no patch depends on others
    extractor = DINOv3FeatureExtractor(model, MEAN, STD)
    control_frames = frames(1, 1)
    before = extractor(control_frames)
    control_frames[..., 16:32, 32:48] = 0
    assert (extractor(control_frames) - before).abs().amax(-1).nonzero().tolist() == [[0, 0, 1, 2]]


@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_the_chunk_size_does_not_change_the_features(chunk_size):
    model, batches = tiny_dinov3(), []
    model.register_forward_pre_hook(lambda _, args: batches.append(len(args[0])))
    features = DINOv3FeatureExtractor(model, MEAN, STD, chunk_size)(frames())
    assert max(batches) == min(chunk_size, 10)
    assert sum(batches) == 10
    expected = DINOv3FeatureExtractor(tiny_dinov3(), MEAN, STD, 2)(frames())
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_have_the_weights_dtype_and_no_graph_under_autocast(dtype):
    extractor = DINOv3FeatureExtractor(tiny_dinov3(), MEAN, STD).to(dtype)
    features = extractor(frames())
    with torch.autocast("cpu", torch.bfloat16):
        within = extractor(frames())
    assert features.dtype == within.dtype == dtype
    assert torch.equal(features, within)
    assert not features.requires_grad
    features.new_zeros(1, requires_grad=True).mul(features).sum().backward()  # usable in a graph afterwards


def test_stays_frozen_and_in_eval_mode():
    extractor = DINOv3FeatureExtractor(tiny_dinov3().train().requires_grad_(True), MEAN, STD)
    torch.nn.ModuleList([extractor]).train()
    assert not any(module.training for module in extractor.modules())
    assert not any(parameter.requires_grad for parameter in extractor.parameters())


@pytest.mark.parametrize(
    ("control_frames", "message"),
    [
        (torch.rand(1, 5, 3, 40, 48), "40x48: height and width must be multiples of DINOv3's patch size 16"),
        (torch.rand(1, 3, 5, 32, 48), r"\(1, 3, 5, 32, 48\).*expected \(B, F, 3, H, W\)"),
        (torch.rand(5, 3, 32, 48), "expected"),
        (torch.zeros(1, 5, 3, 32, 48, dtype=torch.uint8), "uint8"),
    ],
)
def test_wrong_frames_are_named(control_frames, message):
    with pytest.raises(ValueError, match=message):
        DINOv3FeatureExtractor(tiny_dinov3(), MEAN, STD)(control_frames)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_from_pretrained_reads_weights_and_normalisation(folder, dtype):
    extractor = DINOv3FeatureExtractor.from_pretrained(folder, torch_dtype=dtype)
    assert extractor.dtype == (dtype or torch.float32)
    assert (extractor.feature_dim, extractor.patch_size) == (FEATURE_DIM, 16)
    assert extractor.image_mean == MEAN
    expected = tiny_dinov3()
    inv_freq = expected.rope_embeddings.inv_freq.clone()
    expected.to(extractor.dtype).rope_embeddings.inv_freq = inv_freq  # a buffer: loading leaves it in fp32
    assert torch.equal(extractor(frames()), DINOv3FeatureExtractor(expected, MEAN, STD)(frames()))


def test_a_folder_that_does_not_fit_is_refused_in_one_line(folder, tmp_path):
    def refused(name, **changes):
        copy = tmp_path / name
        save_tiny_dinov3(copy)
        for file, content in changes.items():
            path = copy / f"{file}.json"
            path.unlink() if content is None else path.write_text(content)
        with pytest.raises(InputError) as error:
            DINOv3FeatureExtractor.from_pretrained(copy)
        assert "\n" not in str(error.value)
        return str(error.value)

    convnext = json.dumps({"model_type": "dinov3_convnext"})
    assert "model type is dinov3_convnext, but dinov3_vit is needed" in refused("convnext", config=convnext)
    assert "preprocessor_config.json: no such file" in refused("bare", preprocessor_config=None)
    assert "has no entry image_mean, and 1 more" in refused("empty", preprocessor_config="{}")
    assert "not valid JSON" in refused("broken", preprocessor_config="{")
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    assert "its files have 39,936 weights" in refused("short", config=json.dumps(config))


#: Entries of the released ViTs' configs in which they differ, as transformers' conversion of them sets them. All have
#: patches of 16 pixels, 4 registers and no bias of keys.
RELEASED = {
    "S": {"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12},
    "S+": {
        **{"hidden_size": 384, "num_attention_heads": 6, "intermediate_size": 1536, "num_hidden_layers": 12},
        **{"use_gated_mlp": True, "hidden_act": "silu"},
    },
    "B": {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072, "num_hidden_layers": 12},
    "L": {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096, "num_hidden_layers": 24},
    "H+": {
        **{"hidden_size": 1280, "num_attention_heads": 20, "intermediate_size": 5120, "num_hidden_layers": 32},
        **{"use_gated_mlp": True, "hidden_act": "silu"},
    },
    "7B": {
        **{"hidden_size": 4096, "num_attention_heads": 32, "intermediate_size": 8192, "num_hidden_layers": 40},
        **{"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False, "value_bias": False},
    },
}


@pytest.mark.parametrize("kind", RELEASED)
def test_every_released_vit_loads_with_its_structure(kind, tmp_path):
    """Load two layers of a tenth of the heads, or at least two, with the kind's own MLP, biases and registers."""
    config = RELEASED[kind] | {"num_register_tokens": 4, "num_hidden_layers": 2}
    heads = max(config["num_attention_heads"] // 10, 2)
    for name in ("hidden_size", "intermediate_size"):
        config[name] = config[name] * heads // config["num_attention_heads"]
    torch.manual_seed(0)
    model = DINOv3ViTModel(DINOv3ViTConfig(**config | {"num_attention_heads": heads})).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": MEAN, "image_std": STD}))
    width, count = check_dinov3(tmp_path, [(32, 48)])
    extractor = DINOv3FeatureExtractor.from_pretrained(tmp_path)
    assert extractor.feature_dim == width == config["hidden_size"]
    assert count == sum(parameter.numel() for parameter in model.parameters())
    assert hasattr(model.model.layer[0].mlp, "gate_proj") == ("+" in kind or kind == "7B")
    assert (model.model.layer[0].attention.q_proj.bias is None) == (kind == "7B")
    assert torch.equal(extractor(frames()), DINOv3FeatureExtractor(model, MEAN, STD)(frames()))


@pytest.mark.parametrize("kind", RELEASED)
def test_the_sizes_of_every_released_vit_are_accepted(kind, tmp_path):
    """Check the whole config, without weights."""
    config = RELEASED[kind] | {"model_type": "dinov3_vit", "patch_size": 16, "num_register_tokens": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_dinov3_config(tmp_path) == config
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in DINOv3ViTModel(DINOv3ViTConfig(**config)).parameters())
    millions = {"S": 22, "S+": 29, "B": 86, "L": 303, "H+": 841, "7B": 6716}  # as on the models' page
    assert round(count / 1e6) == pytest.approx(millions[kind], rel=0.02)
