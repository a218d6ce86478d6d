"""Long videos: windows, their weights, their noise, and the pipeline with them."""

from itertools import pairwise

import pytest
import torch
from diffusers import AutoencoderKLWan, FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, MagCacheConfig

from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.streaming import stream_frames
from c2r.models.vae import decode_latents
from c2r.pipeline import C2RPipeline
from c2r.toy.layout import WEIGHTS
from c2r.windows import Window, blend_windows, default_overlap, extend_noise, plan_windows
from tests.helpers import tiny


def weights_of(windows):
    """The weight of each window at each latent frame, by blending predictions of ones and zeros."""
    like = torch.empty(1, 1, windows[-1].stop, 1, 1)
    rows = []
    for chosen in range(len(windows)):

        def predict(number, chosen=chosen):
            window = windows[number]
            return torch.full((1, 1, window.stop - window.start, 1, 1), float(number == chosen))

        rows.append(blend_windows(windows, predict, like).flatten())
    return torch.stack(rows)


@pytest.mark.parametrize("length", [2, 3, 6])
def test_windows_cover_the_video_and_their_weights_sum_to_one(length):
    for overlap in {1, length // 2, length - 1} - {0}:
        for num_latent_frames in range(1, 3 * length + 2):
            windows = plan_windows(num_latent_frames, length, overlap)
            assert (windows[0].start, windows[-1].stop) == (0, num_latent_frames)
            assert {w.stop - w.start for w in windows} == {min(length, num_latent_frames)}
            assert all(b.start - a.start == length - overlap for a, b in pairwise(windows[:-1]))
            assert all(b.overlap == a.stop - b.start >= overlap for a, b in pairwise(windows))
            weights = weights_of(windows)
            torch.testing.assert_close(weights.sum(0), torch.ones(num_latent_frames))
            assert weights.min() >= 0
            # The first latent frame of a window in the middle has another meaning to the model.
            assert all(weights[i, w.start] == 0 for i, w in enumerate(windows) if i)


def test_weights_rise_linearly_over_the_overlap():
    first, second = weights_of(plan_windows(8, 6, 4))
    torch.testing.assert_close(second, torch.tensor([0, 0, 0, 1 / 4, 2 / 4, 3 / 4, 1, 1]))
    torch.testing.assert_close(first, 1 - second)


def test_an_overlap_that_is_no_overlap_is_refused():
    for overlap in (0, 5):
        with pytest.raises(ValueError, match=f"overlap is {overlap}: it must be at least 1 and below 5"):
            plan_windows(9, 5, overlap)
    assert plan_windows(5, 5, 0) == [Window(0, 5)]


def test_a_window_in_the_middle_has_the_control_of_its_latent_frames():
    window = Window(3, 6)
    # Latent frame s > 0 encodes pixel frames 4s - 3 to 4s: the window starts with the last one of its first.
    assert list(range(100))[window.frames(4)] == list(range(12, 21))
    assert list(range(100))[Window(0, 3).frames(4)] == list(range(9))


def test_equal_predictions_are_blended_to_themselves():
    whole = torch.randn(2, 3, 11, 4, 4, generator=torch.Generator().manual_seed(0))
    for overlap in (1, 2, 4):
        windows = plan_windows(11, 5, overlap)
        blended = blend_windows(windows, lambda number: whole[:, :, windows[number].latents], whole)  # noqa: B023
        assert torch.equal(blended, whole)


def test_noise_of_a_latent_frame_does_not_depend_on_the_length():
    def noise(length, batch_generators=False):
        generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
        generator = generators if batch_generators else generators[0]
        if batch_generators:
            first = torch.cat([torch.randn(1, 4, 3, 2, 2, generator=g) for g in generators])
        else:
            first = torch.randn(2, 4, 3, 2, 2, generator=generator)
        return extend_noise(first, length, generator)

    for batch_generators in (False, True):
        longest = noise(11, batch_generators)
        assert longest.shape == (2, 4, 11, 2, 2)
        assert all(torch.equal(noise(n, batch_generators), longest[:, :, :n]) for n in (3, 4, 8))
        assert len(longest.unique()) == longest.numel()


def test_default_overlap_is_about_a_quarter():
    assert [default_overlap(length) for length in (2, 3, 4, 13, 21)] == [1, 1, 1, 3, 5]


# ------------------------------------------------------------------------------------------------------- the pipeline

HEIGHT, WIDTH, WINDOW = 32, 48, 9


@pytest.fixture(scope="module")
def pipeline():
    pipeline = C2RPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=tiny.tiny_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=tiny.tiny_c2r_transformer(trained=True).eval(),
        dinov3=DINOv3FeatureExtractor(tiny.tiny_dinov3(), [0.5] * 3, [0.25] * 3, chunk_size=4),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, num_frames, **arguments):
    embeds = torch.randn(2, 1, 7, tiny.TEXT_DIM, generator=torch.Generator().manual_seed(1))
    control = torch.rand(num_frames, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2))
    arguments = {
        "control_video": control,
        "num_inference_steps": 3,
        "generator": torch.Generator().manual_seed(0),
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "output_type": "latent",
    } | arguments
    return pipeline(**arguments).frames


class Inputs:
    """Keeps the inputs of each call of a module."""

    def __init__(self, module):
        self.calls = []
        self.handle = module.register_forward_pre_hook(lambda _, args: self.calls.append(args))

    def __enter__(self):
        return self.calls

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("guidance", ["apg", "cfg"])
def test_a_video_of_one_window_is_the_plain_result(pipeline, guidance):
    plain = generate(pipeline, WINDOW, guidance=guidance, output_type="np")
    for window_frames in (WINDOW, WINDOW + 4):
        arguments = {"guidance": guidance, "window_frames": window_frames, "output_type": "np"}
        assert (generate(pipeline, WINDOW, **arguments) == plain).all()


def test_windows_start_from_the_noise_and_the_control_of_their_place(pipeline):
    with Inputs(pipeline.transformer) as short:
        generate(pipeline, WINDOW, num_inference_steps=1, guidance_scale=1.0)
    with Inputs(pipeline.transformer) as long:
        generate(pipeline, 21, num_inference_steps=1, guidance_scale=1.0, window_frames=WINDOW, window_overlap=5)
    assert [len(calls) for calls in (short, long)] == [1, 4]
    features = pipeline.dinov3(torch.rand(1, 21, 3, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(2)))
    assert torch.equal(long[0][0], short[0][0])
    for number, (noise, _, _, control, _) in enumerate(long):
        torch.testing.assert_close(control, features[:, 4 * number : 4 * number + WINDOW])
        if number:  # the shared noise: windows start at latent frames 0, 1, 2, 3
            assert torch.equal(noise[:, :, :2], long[number - 1][0][:, :, 1:])


def test_frames_before_the_first_fade_do_not_depend_on_what_follows(pipeline):
    # Windows that share one latent frame: the first one alone decides over its own.
    arguments = {"window_frames": WINDOW, "window_overlap": 1}
    alone, longer = (generate(pipeline, frames, **arguments) for frames in (WINDOW, 25))
    assert longer.shape[2] == 7
    assert torch.equal(longer[:, :, :3], alone)


@pytest.mark.parametrize(
    "config",
    [
        FirstBlockCacheConfig(threshold=1e6),
        MagCacheConfig(num_inference_steps=3, mag_ratios=torch.ones(3), threshold=1e6, retention_ratio=0.0),
    ],
)
def test_caches_do_not_mix_the_windows(pipeline, config):
    uncached = generate(pipeline, WINDOW)
    pipeline.transformer.enable_cache(config)
    try:
        arguments = {"window_frames": WINDOW, "window_overlap": 1, "control_guidance_scale": 2.0}
        alone, longer = (generate(pipeline, frames, **arguments) for frames in (WINDOW, 25))
    finally:
        pipeline.transformer.disable_cache()
    assert torch.equal(longer[:, :, :3], alone)
    assert not torch.equal(alone, uncached)


def test_models_never_see_more_than_one_window(pipeline):
    def largest(num_frames):
        modules = (pipeline.transformer, pipeline.dinov3, pipeline.vae.decoder)
        with Inputs(modules[0]) as first, Inputs(modules[1]) as second, Inputs(modules[2]) as third:
            generate(pipeline, num_frames, window_frames=WINDOW, num_inference_steps=1, output_type="np")
        inputs = ([x for args in calls for x in args if torch.is_tensor(x)] for calls in (first, second, third))
        return [max(tensor.numel() for tensor in tensors) for tensors in inputs]

    assert largest(41) == largest(17)


@pytest.mark.parametrize("output_type", ["np", "pt", "pil"])
def test_frames_of_a_long_video_are_those_of_its_latents(pipeline, output_type):
    arguments = {"window_frames": WINDOW, "num_inference_steps": 1}
    frames = generate(pipeline, 17, output_type=output_type, **arguments)
    latents = generate(pipeline, 17, **arguments)
    expected = pipeline.video_processor.postprocess_video(decode_latents(pipeline.vae, latents), output_type)
    if output_type == "pil":
        assert [list(frame.getdata()) for frame in frames[0]] == [list(frame.getdata()) for frame in expected[0]]
    else:
        assert frames.shape == expected.shape
        assert (frames == expected).all()


@pytest.mark.parametrize("mode", ["plain", "tiled", "sliced", "single", "patches", "tiled patches"])
def test_streaming_decodes_bit_for_bit(mode):
    vae = tiny.tiny_vae()
    if "patches" in mode:  # the toy's VAE decodes the pixels of a patch as channels
        vae = AutoencoderKLWan.from_pretrained(WEIGHTS / "model/vae", torch_dtype=torch.float32).eval()
    if "tiled" in mode:
        vae.enable_tiling(32, 32, 16, 24)
    if mode == "sliced":
        vae.enable_slicing()
    latents = torch.randn(2, vae.config.z_dim, 1 if mode == "single" else 4, 6, 9)
    expected = decode_latents(vae, latents)
    chunks = list(stream_frames(vae, latents, torch.device("cpu")))
    assert torch.equal(torch.cat(chunks, 2), expected)
    if mode == "plain":
        assert [chunk.shape[2] for chunk in chunks] == [1, 4, 4, 4]


def test_a_callback_and_an_interrupt_see_the_whole_video(pipeline):
    seen = []

    def callback(pipeline, step, timestep, tensors):
        seen.append({name: tensor.shape for name, tensor in tensors.items()})
        pipeline._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    frames = generate(
        pipeline,
        17,
        window_frames=WINDOW,
        callback_on_step_end=callback,
        callback_on_step_end_tensor_inputs=["latents", "control_features"],
    )
    assert not frames.any()
    assert [s["latents"][2] for s in seen] == [5, 5]
    assert [s["control_features"][1] for s in seen] == [17, 17]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window_frames": 8}, "window_frames is 8: it must be a multiple of 4 plus 1"),
        ({"window_overlap": 4}, "window_overlap is 4: it must be a multiple of 4 plus 1"),
        ({"window_overlap": 9}, "window_overlap is 9: it must be below window_frames, 9"),
        ({"window_frames": 1}, "window_frames is 1: windows of a longer video overlap; give at least 5"),
    ],
)
def test_bad_windows_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, 17, **{"window_frames": WINDOW} | arguments)
