"""python -m c2r.generate: what decides the videos, agreement with Diffusers, and one line for bad input."""

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import WanPipeline, WanTransformer3DModel
from PIL import Image
from safetensors.torch import load_file, save_file

from c2r import InputError, cli
from c2r.data.video import probe, read_window
from c2r.data.video_writer import write_video
from c2r.generate import main
from c2r.models.backbone import fingerprint_transformer
from c2r.models.contract import read_contract, save_phase
from c2r.pipeline import encode_prompts
from tests.helpers import tiny
from tests.helpers.attention import recorded_backends
from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH, save_trained_models


def write_noise(path, seed, num_frames=12, fps=FPS):
    frames = np.random.default_rng(seed).integers(0, 256, (num_frames, 4, 6, 3), dtype=np.uint8)
    write_video(path, frames.repeat(16, 1).repeat(16, 2), fps)  # blocks of colour: they survive the codec
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The trained models, coarse0.mp4 and coarse1.mp4."""
    folder = save_trained_models(tmp_path_factory.mktemp("models"))
    for i in range(2):
        write_noise(folder / f"coarse{i}.mp4", seed=i)
    return folder


def options(folder, phase=2, control=True, **changed):
    """Arguments of a command line; None leaves an option out, True is a flag, a list repeats an option."""
    given = {
        "model": folder / f"phase{phase}/best",
        "prompt": "the street",
        "control_video": folder / "coarse0.mp4" if control else None,
        "num_inference_steps": 2,
    } | changed
    arguments = []
    for name, value in given.items():
        for one in value if isinstance(value, list) else [value]:
            arguments += [] if one is None else [f"--{name}"] if one is True else [f"--{name}={one}"]
    return arguments


def generated(folder, output, **changed):
    """Run the command and return the frames that it wrote, (F, 3, H, W) as floats."""
    main(options(folder, output=output, **changed))
    info = probe(output)
    num_frames = info.frames_at(changed.get("fps", FPS))
    height, width = changed.get("height", HEIGHT), changed.get("width", WIDTH)
    return torch.as_tensor(read_window(output, 0.0, num_frames, changed.get("fps", FPS), height, width)).float()


@pytest.fixture(scope="module")
def standard(folder, tmp_path_factory):
    """A video at the default options."""
    return generated(folder, tmp_path_factory.mktemp("standard") / "out.mp4")


def distance(a, b):
    return (a - b).abs().mean().item()


def test_seed_control_and_scales_determine_the_video(folder, tmp_path):
    video = generated(folder, tmp_path / "new" / "out.mp4")
    assert video.shape == (FRAMES, 3, HEIGHT, WIDTH)
    assert distance(video, generated(folder, tmp_path / "again.mp4")) == 0
    for name, changed in {
        "seed": {"seed": 1},
        "control": {"control_video": folder / "coarse1.mp4"},
        "none": {"control_video": None},
        "scale": {"conditioning_scale": 0.3},
        "shift": {"flow_shift": 9},
    }.items():
        assert distance(video, generated(folder, tmp_path / f"{name}.mp4", **changed)) > 0.5, name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_inference_steps", 3),
        ("guidance", "cfg"),
        ("guidance_scale", 3.0),
        ("control_guidance_scale", 3.0),
        ("control_guidance_start", 0.5),
        ("control_guidance_end", 0.5),
        ("negative_prompt", "rain"),
    ],
)
def test_each_sampling_option_reaches_the_video(folder, tmp_path, standard, name, value):
    changed = {"guidance_scale": 10.0, name: value}
    assert distance(standard, generated(folder, tmp_path / "out.mp4", **changed)) > 0


def test_the_attention_backend_computes_the_same_video(folder, tmp_path):
    videos = []
    for backend in ("native", "_native_math"):
        with recorded_backends() as calls:
            output = tmp_path / f"{backend}.mp4"
            # Guidance would enlarge the differences of rounding.
            videos.append(generated(folder, output, attention_backend=backend, guidance_scale=1))
        assert set(calls) == {backend}
    assert distance(*videos) < 0.1


def test_several_videos_agree_with_single_ones(folder, tmp_path):
    prompts, controls = ["rain", "dusk"], [folder / "coarse0.mp4", folder / "coarse1.mp4"]
    main(options(folder, output=tmp_path / "all.mp4", prompt=prompts, control_video=controls))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all-0.mp4", "all-1.mp4"]
    for i in range(2):
        together = torch.as_tensor(read_window(tmp_path / f"all-{i}.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH)).float()
        alone = generated(folder, tmp_path / "one.mp4", prompt=prompts[i], control_video=controls[i])
        assert distance(together, alone) == 0


@pytest.mark.parametrize("many", ["prompt", "control_video"])
def test_one_prompt_or_one_control_applies_to_all_videos(folder, tmp_path, many):
    values = {"prompt": ["rain", "dusk"], "control_video": [folder / "coarse0.mp4", folder / "coarse1.mp4"]}
    main(options(folder, output=tmp_path / "all.mp4", **{many: values[many]}))
    frames = [np.asarray(read_window(tmp_path / f"all-{i}.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH)) for i in range(2)]
    assert (frames[0] != frames[1]).any()


def test_size_options_override_the_models(folder, tmp_path):
    video = generated(folder, tmp_path / "out.mp4", height=48, width=32, num_frames=9, fps=6.0)
    assert video.shape == (9, 3, 48, 32)
    assert probe(tmp_path / "out.mp4").rate == pytest.approx(6)


def test_phase_1_agrees_with_a_stock_pipeline(folder, tmp_path):
    # A pixel that is rounded otherwise changes its neighbours in the lossy file. At this scale none is, with each of
    # four instruction sets.
    arguments = {"guidance": "cfg", "guidance_scale": 3, "negative_prompt": "rain", "seed": 3}
    video = generated(folder, tmp_path / "out.mp4", phase=1, control=False, **arguments)
    stock = WanPipeline.from_pretrained(
        folder / "base", transformer=WanTransformer3DModel.from_pretrained(folder / "phase1/best")
    )
    frames = stock(
        "the street",
        "rain",
        HEIGHT,
        WIDTH,
        FRAMES,
        num_inference_steps=2,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(3),
        max_sequence_length=tiny.PROMPT_LENGTH,
    ).frames[0]
    write_video(tmp_path / "stock.mp4", (frames * 255).round().astype(np.uint8), FPS)
    expected = torch.as_tensor(read_window(tmp_path / "stock.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH)).float()
    assert distance(video, expected) < 0.1


def test_prompts_are_padded_with_zeros(folder):
    rain, street = encode_prompts(folder / "base", ["rain", "a street"], "cpu", torch.float32)
    assert rain.shape == (1, tiny.PROMPT_LENGTH, tiny.TEXT_DIM)
    assert (rain[0, 2:] == 0).all()  # one word, </s>, then zeros
    assert (street[0, 2] != 0).any()


def test_a_moved_backbone_can_be_named_and_another_is_refused(folder, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder / "phase1/best", moved)
    generated(folder, tmp_path / "out.mp4", backbone=moved)
    other = tmp_path / "other"
    save_phase(other, tiny.tiny_transformer(seed=6), read_contract(folder / "phase1/best"))
    with pytest.raises(InputError) as error:
        main(options(folder, output=tmp_path / "refused.mp4", backbone=other))
    assert fingerprint_transformer(other) in str(error.value)
    assert fingerprint_transformer(moved) in str(error.value)
    assert not (tmp_path / "refused.mp4").exists()


@pytest.fixture(scope="module")
def unreadable(folder, tmp_path_factory):
    """The models with damaged text encoder weights, which raise another error if they are read too early."""
    copy = tmp_path_factory.mktemp("unreadable") / "models"
    shutil.copytree(folder, copy)
    (copy / "base/text_encoder/model.safetensors").write_bytes(b"damaged")
    write_noise(copy / "short.mp4", seed=2, num_frames=3)
    (copy / "text.mp4").write_text("no video")
    Image.new("RGB", (64, 32)).save(copy / "one.png")
    return copy


BAD_INPUT = [
    ({}, "{}/base/text_encoder/model.safetensors: cannot be read as safetensors"),
    ({"model": "{}/base"}, "has no c2r.json"),
    ({"model": "{}/absent"}, "{}/absent"),
    ({"control_video": "{}/absent.mp4"}, "{}/absent.mp4"),
    ({"control_video": "{}/text.mp4"}, "{}/text.mp4: cannot be decoded"),
    ({"control_video": "{}/one.png"}, "--control_video {}/one.png: one picture, but --num_frames is 5; give a video"),
    ({"control_video": "{}/short.mp4"}, "{}/short.mp4: gives 3 frames at 8 fps, but --num_frames is 5"),
    ({"attention_backend": "flash"}, "--attention_backend flash: does not work on "),
    ({"attention_backend": "quick"}, "--attention_backend quick: not one of the choices"),
    ({"num_frames": 13}, "coarse0.mp4: gives 12 frames"),
    ({"phase": 1}, "phase 1 has no control"),
    ({"pretrained_model_name_or_path": "{}/dinov3"}, "has no vae/"),
    ({"dinov3": "{}/absent"}, "{}/absent"),
    ({"backbone": "{}/absent"}, "{}/absent"),
    ({"backbone": "{}/dinov3"}, "{}/dinov3"),
    ({"output": "out.avi"}, "--output out.avi"),
    ({"output": "{}/text.mp4/out.mp4"}, "its folder cannot be created"),
    ({"output": "{}/coarse0.mp4"}, "would overwrite --control_video"),
    ({"height": 40}, "--height 40: "),
    ({"width": 0}, "--width 0: "),
    ({"num_frames": 4}, "--num_frames 4: "),
    ({"num_inference_steps": 0}, "--num_inference_steps 0: "),
    ({"fps": 0}, "--fps 0: "),
    ({"fps": "nan"}, "--fps nan: "),
    ({"flow_shift": -1}, "--flow_shift -1: "),
    ({"guidance_scale": -1}, "--guidance_scale -1: "),
    ({"conditioning_scale": "inf"}, "--conditioning_scale inf: "),
    (
        {"control_guidance_start": 0.8, "control_guidance_end": 0.2},
        "--control_guidance_start 0.8: not below --control_guidance_end 0.2",
    ),
    ({"control_guidance_end": 1.5}, "--control_guidance_end 1.5: "),
    ({"prompt": ["a", "b", "c"], "control_video": ["{}/coarse0.mp4", "{}/coarse1.mp4"]}, "given 2 times, --prompt 3"),
]


@pytest.mark.parametrize(("changed", "message"), BAD_INPUT)
def test_bad_input_is_one_line_before_any_weight_is_read(unreadable, tmp_path, changed, message):
    def here(value):
        return [here(v) for v in value] if isinstance(value, list) else str(value).replace("{}", str(unreadable))

    changed = {name: value if name == "phase" else here(value) for name, value in changed.items()}
    with pytest.raises(InputError) as error:
        main(options(unreadable, **{"output": tmp_path / "out.mp4"} | changed))
    assert here(message) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prompt_that_is_cut_off_is_named(folder, caplog):
    long = "a rainy street at dusk with three people " * 100
    with caplog.at_level("WARNING"):
        encode_prompts(folder / "base", ["a street", long], "cpu", torch.float32)
    assert "1 prompt is longer than" in caplog.text
    assert "tokens, the rest is not used: 'a rainy street at dusk with three people a rainy street" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_video_that_is_not_finite_is_not_written(folder, tmp_path):
    pipeline = shutil.copytree(folder / "base", tmp_path / "base")
    file = pipeline / "vae/diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    weights["decoder.conv_in.weight"] *= torch.nan
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"a\.mp4: not written, its frames are not finite"):
        generated(folder, tmp_path / "a.mp4", pretrained_model_name_or_path=pipeline)
    assert not (tmp_path / "a.mp4").exists()


def test_offloading_from_no_gpu_is_refused(folder, tmp_path):
    with pytest.raises(InputError, match=r"^--cpu_offload"):
        main(options(folder, output=tmp_path / "out.mp4", cpu_offload=True))


def test_the_command_ends_with_one_line(tmp_path):
    with pytest.raises(SystemExit, match=r"^error: .*phase2/best: no such model folder; check the path"):
        cli.run(lambda: main(options(tmp_path, output=tmp_path / "out.mp4")))


def test_a_long_video_is_made_of_windows(folder, tmp_path, capsys):
    # 12 frames of control, the windows of training: 5 frames; the 13th frame that 4k + 1 needs is not written.
    long = generated(folder, tmp_path / "long.mp4", num_frames="all")
    assert "generates 13 frames in 3 windows of 5, overlapping by 1\n" in capsys.readouterr().out
    assert long.shape == (12, 3, HEIGHT, WIDTH)
    generated(folder, tmp_path / "short.mp4", num_frames=9, window_frames=9)
    assert "generates 9 frames in one window; the model was trained on 5\n" in capsys.readouterr().out
    generated(folder, tmp_path / "as-trained.mp4")
    assert "generates" not in capsys.readouterr().out


def test_the_first_window_of_a_longer_video_is_the_video_of_one_window(folder, tmp_path, standard):
    # Windows of 5 frames share one latent frame, whose weight in the later window is 0.
    long = generated(folder, tmp_path / "long.mp4", num_frames=9)
    assert distance(long[:FRAMES], standard) < 1.0  # encoded again
    assert distance(long[:FRAMES], standard.flip(0)) > 5


@pytest.fixture
def contract_with(folder):
    """Return a function that writes a folder of phase 1 with a changed contract."""
    folder = folder / "changed"

    def write(**changed):
        copy = shutil.copytree(folder.parent / "phase1/best", folder / "best")  # beside the models that it names
        contract = json.loads((copy / "c2r.json").read_text()) | changed
        (copy / "c2r.json").write_text(json.dumps(contract))
        return copy

    yield write
    shutil.rmtree(folder, ignore_errors=True)


def test_a_model_of_single_pictures_generates_a_video_in_one_window(folder, tmp_path, capsys, contract_with):
    model = contract_with(num_frames=1)
    main(options(folder, control=False, model=model, num_frames=9, output=tmp_path / "out.mp4"))
    assert "generates 9 frames in one window; the model was trained on 1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"^--window_frames 1: windows of a longer video overlap; give at least 5"):
        main(options(folder, control=False, window_frames=1, output=tmp_path / "out.mp4"))


def test_the_rate_may_be_the_controls(folder, tmp_path):
    write_noise(tmp_path / "fast.mp4", seed=5, fps=24)
    main(options(folder, output=tmp_path / "out.mp4", control_video=tmp_path / "fast.mp4", fps="control"))
    assert probe(tmp_path / "out.mp4").rate == pytest.approx(24)
    main(options(folder, output=tmp_path / "all.mp4", control_video=tmp_path / "fast.mp4", fps=12, num_frames="all"))
    assert probe(tmp_path / "all.mp4").native_frames == 6
