"""The released C2R adapter: its file, its place in the model, and its numbers against a few lines of their own."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from c2r import InputError
from c2r.models import hub
from c2r.models.contract import read_contract
from c2r.models.controlnet import C2RControlNet
from c2r.models.controlnet_files import control_start_config, load_control_start
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.released import read_released
from c2r.models.transformer import C2RTransformer
from c2r.pipeline import C2RPipeline
from tests.helpers import tiny
from tests.helpers.released import released_tensors, save_released


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return save_released(tmp_path_factory.mktemp("released") / "adapter.safetensors")


def expected_tokens(features):
    """The adapter's formula on (F, h, w, Dd), frame by frame: (T, h, w, D) in float64."""
    w = {name: tensor.double() for name, tensor in released_tensors().items()}
    tokens = []
    for t in range((len(features) - 1) // 4 + 1):
        taps = range(max(0, 4 * t - 4), min(len(features), 4 * t + 5))
        mean = sum(
            w["temporal_downsample.conv.weight"][:, 0, n - 4 * t + 4, 0, 0] * features[n].double() for n in taps
        )
        centred = mean - mean.mean(-1, keepdim=True)
        normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w["ln.weight"] + w["ln.bias"]
        tokens.append((normed @ w["proj.weight"].T + w["proj.bias"]) * w["gate"])
    return torch.stack(tokens)


@pytest.mark.parametrize("num_frames", [1, 5, 13, 81])
def test_its_tokens_are_added_to_the_patch_embedded_latents(file, num_frames):
    backbone = tiny.tiny_transformer()
    model = C2RTransformer(copy.deepcopy(backbone), load_control_start(file, backbone.config)).eval()
    latent_frames = (num_frames - 1) // 4 + 1
    noisy, timesteps, prompt, features = tiny.tiny_inputs(1, latent_frames, height=32, width=48)
    tokens = expected_tokens(features[0])  # (T, h, w, D)
    ours = model.controlnet.control_adapter(features, tuple(tokens.shape[:3]))
    torch.testing.assert_close(ours[0].double(), tokens.flatten(0, 2), rtol=1e-4, atol=1e-4)

    backbone.patch_embedding.register_forward_hook(lambda *call: call[-1] + 0.7 * tokens.permute(3, 0, 1, 2).float())
    with torch.no_grad():
        expected = backbone.eval()(noisy, timesteps, prompt).sample
        velocity = model(noisy, timesteps, prompt, features, 0.7).sample
        without = model(noisy, timesteps, prompt, None).sample
    torch.testing.assert_close(velocity, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(velocity, without, atol=1e-3)


def test_a_new_adapter_starts_with_the_released_ones_gate():
    backbone = tiny.tiny_transformer()
    controlnet = C2RControlNet.from_transformer(backbone, feature_dim=tiny.FEATURE_DIM, injection="latent")
    assert (controlnet.control_adapter.gate == 0.01).all()
    assert len(controlnet.control_blocks) == 0
    model = C2RTransformer(backbone, controlnet).train()
    noisy, timesteps, prompt, features = tiny.tiny_inputs()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.enable_gradient_checkpointing()
        model.zero_grad()
        model(noisy, timesteps, prompt, features).sample.square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in controlnet.named_parameters()})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_saved_one_loads_again(tmp_path, file):
    config = tiny.tiny_transformer().config
    controlnet = load_control_start(file, config)
    controlnet.save_pretrained(tmp_path)
    again = load_control_start(tmp_path, config)
    assert again.config.injection == "latent"
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), controlnet.state_dict().values()))
    assert load_control_start(file, config, torch.bfloat16).control_adapter.proj.weight.dtype == torch.bfloat16


def test_a_pickle_is_read_without_running_it(tmp_path, file, caplog):
    torch.save(released_tensors((1,)), tmp_path / "adapter.pt")
    with caplog.at_level("WARNING"):
        weights = read_released(tmp_path / "adapter.pt")
    assert "a pickle, of which tensors alone are loaded" in caplog.text
    assert all(torch.equal(weights[name], tensor) for name, tensor in read_released(file).items())

    class Harmful:
        def __reduce__(self):
            return print, ("run",)

    torch.save({"gate": Harmful()}, tmp_path / "harmful.pt")
    with pytest.raises(InputError, match=r"harmful\.pt: cannot be read as weights"):
        read_released(tmp_path / "harmful.pt")


@pytest.mark.parametrize(
    "damage",
    [
        *(b"hello world", b".", b"\x80\x02X\x04\0\0\0\xff\xff\xff\xff.", b"", b"PK\x03\x04"),
        *([1, 2], {"gate": 1}, {1: torch.zeros(1), "gate": torch.zeros(1)}),
        *(released_tensors() | {"gate": gate} for gate in (None, 0.3, torch.ones(1, dtype=torch.int))),
        released_tensors() | {"gate": torch.zeros(1).to_sparse()},
        released_tensors() | {"gate": torch.zeros(1, device="meta")},
    ],
)
def test_a_damaged_pickle_is_one_line(damage, tmp_path):
    path = tmp_path / "adapter.pt"
    path.write_bytes(damage) if isinstance(damage, bytes) else torch.save(damage, path)
    with pytest.raises(InputError, match=f"^{path}: ") as error:
        read_released(path)
    assert "\n" not in str(error.value)


def test_a_wrong_safetensors_file_is_refused_by_its_header(tmp_path, monkeypatch):
    monkeypatch.setattr("c2r.models.hub.SafetensorsFile.tensor", None)
    save_file({"blocks.0.attn1.to_q.weight": torch.zeros(2)}, tmp_path / "backbone.safetensors")
    with pytest.raises(InputError, match=r"has blocks\.0\.attn1\.to_q\.weight, but the released"):
        read_released(tmp_path / "backbone.safetensors")
    save_file(released_tensors() | {"proj.weight": torch.zeros(24, 3)}, tmp_path / "adapter.safetensors")
    with pytest.raises(InputError, match="its shapes are not those of an adapter"):
        read_released(tmp_path / "adapter.safetensors")
    (tmp_path / "adapter.safetensors").write_bytes(b"hello")
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        read_released(tmp_path / "adapter.safetensors")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"gate": None}, "has ln.bias, ln.weight, proj.bias, …, but the released C2R adapter has temporal_downsample"),
        ({"ln.bias": torch.zeros(3)}, r"its shapes are not those of an adapter: ln.bias \(3,\)"),
        ({"gate": torch.zeros(2)}, r"its shapes are not those of an adapter: gate \(2,\)"),
        ({"proj.weight": torch.zeros(40, 32), "proj.bias": torch.zeros(40)}, "of width 40, this one has 24"),
    ],
)
def test_other_files_are_refused(tmp_path, changed, message):
    tensors = {name: t for name, t in (released_tensors() | changed).items() if t is not None}
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=message):
        control_start_config(tmp_path / "other.safetensors", tiny.tiny_transformer().config)


def test_injection_and_layers_must_fit():
    shared = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 48, "num_layers": 4}
    for injection, layers in (("latent", [0]), ("blocks", []), ("tokens", [0])):
        with pytest.raises(ValueError, match="they do not fit"):
            C2RControlNet(injection_layers=layers, injection=injection, **shared)


def test_a_saved_one_names_the_models_of_the_hub_that_it_is_a_copy_of(tmp_path, file, monkeypatch):
    cached = {"Wan-AI/Wan2.1-T2V-14B-Diffusers": tiny.save_tiny_pipeline(tmp_path / "cache/wan")}
    cached["facebook/dinov3-vitb16"] = tiny.save_tiny_dinov3(tmp_path / "cache/dinov3")
    monkeypatch.setattr(hub, "snapshot_download", lambda name, **_: str(cached[name]))
    wan, dinov3 = cached
    C2RPipeline.from_pretrained(wan, controlnet=file, dinov3=dinov3).save_pretrained(tmp_path / "saved")
    assert read_contract(tmp_path / "saved").copied_from == {"base_model": wan, "backbone": wan, "dinov3": dinov3}
    assert "license: other" in (tmp_path / "saved/README.md").read_text()


def test_the_pipeline_loads_saves_and_runs_it(tmp_path, file):
    pipeline_folder = tiny.save_tiny_pipeline(tmp_path / "wan")
    dinov3 = tiny.save_tiny_dinov3(tmp_path / "dinov3")
    pipeline = C2RPipeline.from_pretrained(pipeline_folder, controlnet=file, dinov3=dinov3)
    assert (pipeline.contract.flow_shift, pipeline.scheduler.shift) == (5.0, 5.0)
    pipeline.save_pretrained(tmp_path / "saved")
    again = C2RPipeline.from_pretrained(tmp_path / "saved")
    assert isinstance(again.dinov3, DINOv3FeatureExtractor)

    def generated(pipeline, **arguments):
        pipeline.set_progress_bar_config(disable=True)
        video = torch.rand(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
        generator = torch.Generator().manual_seed(0)
        arguments = {"control_video": video, "num_inference_steps": 2, "generator": generator} | arguments
        return torch.tensor(pipeline("a street", **arguments).frames)

    video = generated(pipeline)
    assert torch.equal(generated(again), video)
    assert not torch.allclose(generated(pipeline, conditioning_scale=0.0), video, atol=1e-3)
    assert read_contract(tmp_path / "saved").copied_from == {}
    with pytest.raises(InputError, match="has control already"):
        C2RPipeline.from_pretrained(tmp_path / "saved", controlnet=file)
    with pytest.raises(InputError, match=r"not a file; .* C2RPipeline\.from_pretrained"):
        C2RPipeline.from_pretrained(pipeline_folder, controlnet=tmp_path / "saved/controlnet", dinov3=dinov3)
    next(pipeline_folder.glob("transformer/*.safetensors")).unlink()  # refused before weights are read
    with pytest.raises(InputError, match="needs dinov3"):
        C2RPipeline.from_pretrained(pipeline_folder, controlnet=file)
