"""C2RPipeline: guidance, control, agreement with WanPipeline, and errors for bad arguments."""

import itertools

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanPipeline,
)

from c2r import InputError
from c2r.guidance import DEFAULT_GUIDANCE_SCALE
from c2r.models.adversary import DomainClassifier, WithAdversary
from c2r.models.controlnet import C2RControlNet
from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.models.parts import max_sequence_length
from c2r.models.transformer import C2RTransformer
from c2r.pipeline import C2RPipeline, Sampling, with_flow_shift
from tests.helpers import tiny

FRAMES, HEIGHT, WIDTH = 5, 32, 48
PROMPT = "the street with three people"
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def controlled_transformer():
    """A C2RTransformer with random projectors, so that its residuals are not zero as in a fresh one."""
    transformer = tiny.tiny_transformer()
    torch.manual_seed(1)
    controlnet = C2RControlNet.from_transformer(transformer, control_layers=2, feature_dim=tiny.FEATURE_DIM)
    for control_block in controlnet.control_blocks:
        torch.nn.init.normal_(control_block.projector[2].weight, std=0.5)
    return C2RTransformer(transformer, controlnet).eval()


@pytest.fixture(scope="module")
def parts():
    return {
        "tokenizer": tiny.tiny_tokenizer(),
        "text_encoder": tiny.tiny_text_encoder(),
        "vae": tiny.tiny_vae(),
        "transformer": controlled_transformer(),
        "dinov3": DINOv3FeatureExtractor(tiny.tiny_dinov3(), **IMAGENET),
    }


def pipeline_of(parts, **changed):
    pipeline = C2RPipeline(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts | changed)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline(parts):
    return pipeline_of(parts)


def control_video(seed=0, batch_size=None):
    shape = (FRAMES, 3, HEIGHT, WIDTH) if batch_size is None else (batch_size, FRAMES, 3, HEIGHT, WIDTH)
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


def generate(pipeline, seed=0, **arguments):
    arguments = {
        "prompt": PROMPT,
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "num_inference_steps": 4,
        "generator": torch.Generator().manual_seed(seed),
        "output_type": "latent",
    } | arguments
    return pipeline(**arguments).frames


class Calls:
    """Records the control, prompt embeddings and conditioning scale of each forward pass of the transformer."""

    def __init__(self, pipeline):
        self.controls, self.prompts, self.scales = [], [], []
        self.handle = pipeline.transformer.register_forward_pre_hook(self.record)

    def record(self, module, args):
        _, _, prompt_embeds, control_features, conditioning_scale = args
        self.controls.append("off" if control_features is None else "on" if control_features.any() else "blank")
        self.prompts.append(prompt_embeds)
        self.scales.append(conditioning_scale)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


class RecordingScheduler(FlowMatchEulerDiscreteScheduler):
    """Keeps the velocity and the noisy latents of each step."""

    def set_timesteps(self, *args, **options):
        self.velocities, self.samples = [], []
        super().set_timesteps(*args, **options)

    def step(self, velocity, timestep, sample, **options):
        self.velocities.append(velocity)
        self.samples.append(sample)
        return super().step(velocity, timestep, sample, **options)


def test_apg_keeps_its_momentum_from_step_to_step(parts):
    pipeline, predictions, running = pipeline_of(parts), [], 0.0
    pipeline.scheduler = RecordingScheduler(shift=3.0)
    handle = pipeline.transformer.register_forward_hook(lambda _, args, output: predictions.append(output.sample))
    generate(pipeline, control_video=control_video(), num_inference_steps=2, guidance_scale=4.0)
    handle.remove()
    assert len(predictions) == 4
    for velocity, with_control, with_both in zip(pipeline.scheduler.velocities, predictions[::2], predictions[1::2]):
        running = with_both - with_control - 0.5 * running
        kept = running - (running * with_both).sum() / (with_both * with_both).sum() * with_both
        torch.testing.assert_close(velocity, with_control + 4 * kept, rtol=1e-4, atol=1e-4)


# ----------------------------------------------------------------------------------------------------- without control


@pytest.mark.parametrize("bare", [True, False])
def test_without_control_it_agrees_with_a_wan_pipeline(parts, bare):
    transformer = parts["transformer"].transformer
    stock = WanPipeline(
        parts["tokenizer"],
        parts["text_encoder"],
        parts["vae"],
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer,
    )
    ours = pipeline_of(
        parts, transformer=transformer if bare else parts["transformer"], dinov3=None if bare else parts["dinov3"]
    )
    ours.scheduler = stock.scheduler
    arguments = {"negative_prompt": "rain", "guidance_scale": 5.0, "output_type": "np"}
    expected = generate(stock, max_sequence_length=tiny.PROMPT_LENGTH, **arguments)
    torch.testing.assert_close(
        torch.tensor(generate(ours, guidance="cfg", **arguments)), torch.tensor(expected), rtol=0, atol=1e-4
    )


def test_a_stock_pipeline_folder_loads(tmp_path):
    pipeline = C2RPipeline.from_pretrained(tiny.save_tiny_pipeline(tmp_path))
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.dinov3 is None
    assert generate(pipeline, output_type="pt").shape == (1, FRAMES, 3, HEIGHT, WIDTH)


def test_control_is_refused_without_a_controlnet(parts):
    with pytest.raises(ValueError, match="no ControlNet and DINOv3"):
        generate(pipeline_of(parts, transformer=parts["transformer"].transformer), control_video=control_video())
    with pytest.raises(ValueError, match="no ControlNet and DINOv3"):
        generate(pipeline_of(parts, dinov3=None), control_video=control_video())


# -------------------------------------------------------------------------------------------------------- with control


def test_the_seed_determines_the_video(pipeline):
    video = control_video()
    first = generate(pipeline, control_video=video)
    assert torch.equal(first, generate(pipeline, control_video=video))
    assert not torch.equal(first, generate(pipeline, seed=1, control_video=video))


def test_control_and_its_scale_steer_the_video(pipeline):
    free = generate(pipeline)
    steered, other = (generate(pipeline, control_video=control_video(seed)) for seed in (0, 1))
    half = generate(pipeline, control_video=control_video(), conditioning_scale=0.5)
    without = generate(pipeline, control_video=control_video(), conditioning_scale=0.0)
    assert torch.isfinite(steered).all()
    for a, b in itertools.combinations([free, steered, other, half], 2):
        assert (a - b).abs().mean() > 1e-3
    torch.testing.assert_close(without, free)


@pytest.mark.parametrize("control", [False, True])
def test_a_model_with_adversary_gives_the_same_video(parts, control):
    with_adversary = WithAdversary(parts["transformer"], DomainClassifier(tiny.LATENT_CHANNELS, width=8))
    arguments = {"control_video": control_video() if control else None, "num_inference_steps": 2}
    expected = generate(pipeline_of(parts), **arguments)
    assert torch.equal(generate(pipeline_of(parts, transformer=with_adversary), **arguments), expected)


def test_sampling_holds_the_defaults_of_a_call(pipeline):
    assert Sampling().guidance in DEFAULT_GUIDANCE_SCALE
    arguments = {"control_video": control_video(), "num_inference_steps": 2}
    expected = generate(pipeline, **arguments)
    assert torch.equal(generate(pipeline, **arguments | vars(Sampling(num_inference_steps=2))), expected)


def test_control_is_on_in_its_part_of_the_steps_only(pipeline):
    with Calls(pipeline) as calls:
        generate(
            pipeline,
            control_video=control_video(),
            num_inference_steps=8,
            guidance_scale=1.0,
            control_guidance_start=0.25,
            control_guidance_end=0.8,
        )
    assert calls.controls == ["off"] * 2 + ["on"] * 4 + ["off"] * 2


def test_each_forward_pass_gets_its_conditions(pipeline):
    with Calls(pipeline) as calls:
        generate(
            pipeline,
            control_video=control_video(),
            num_inference_steps=2,
            guidance="cfg",
            control_guidance_scale=2.0,
            conditioning_scale=0.7,
            control_guidance_end=0.5,
        )
    with torch.no_grad():
        prompt, empty = pipeline.encode_prompt(PROMPT, max_sequence_length=tiny.PROMPT_LENGTH)
    # While control is on, ∅ is a blank control; while it is off, there is no control term.
    assert calls.controls == ["blank", "on", "on", "off", "off"]
    expected = [empty, empty, prompt, empty, prompt]
    assert all(torch.equal(seen, embeds) for seen, embeds in zip(calls.prompts, expected, strict=True))
    assert set(calls.scales) == {0.7}


@pytest.mark.parametrize("options", [{}, {"guidance": "cfg"}])
def test_the_defaults_need_two_forward_passes_a_step(pipeline, options):
    with Calls(pipeline) as calls:
        generate(pipeline, control_video=control_video(), num_inference_steps=3, **options)
    assert calls.controls == ["on", "on"] * 3


def test_a_batch_agrees_with_single_videos(pipeline):
    prompts, videos = ["rain", "a red brick street"], control_video(batch_size=2)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    batch = generate(pipeline, prompt=prompts, control_video=list(videos), generator=generators)
    for i, seed in enumerate((3, 4)):
        alone = generate(pipeline, seed=seed, prompt=prompts[i], control_video=videos[i])
        torch.testing.assert_close(batch[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_one_control_video_applies_to_all_prompts(pipeline):
    arguments = {"prompt": ["rain", "dusk"], "num_inference_steps": 2}
    one = generate(pipeline, control_video=control_video(), **arguments)
    both = generate(pipeline, control_video=torch.stack([control_video()] * 2), **arguments)
    torch.testing.assert_close(one, both)


def test_embeddings_replace_prompts_and_text_encoder(parts, pipeline):
    with torch.no_grad():
        embeds, negative = pipeline.encode_prompt(PROMPT, "rain", max_sequence_length=tiny.PROMPT_LENGTH)
    without = pipeline_of(parts, tokenizer=None, text_encoder=None)
    arguments = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": negative}
    assert torch.equal(generate(without, **arguments), generate(pipeline, negative_prompt="rain"))
    with pytest.raises(ValueError, match="negative_prompt_embeds"):
        generate(without, prompt=None, prompt_embeds=embeds)


def test_the_default_size_is_that_of_the_control_video(pipeline):
    video = pipeline(PROMPT, control_video(), num_inference_steps=1, output_type="np").frames
    assert video.shape == (1, FRAMES, HEIGHT, WIDTH, 3)
    assert 0 <= video.min() <= video.max() <= 1


def test_half_precision_weights_give_finite_fp32_latents(parts):
    transformer = controlled_transformer().to(torch.bfloat16)
    dinov3 = DINOv3FeatureExtractor(tiny.tiny_dinov3().to(torch.bfloat16), **IMAGENET)
    pipeline = pipeline_of(parts, transformer=transformer, dinov3=dinov3)
    pipeline.scheduler = RecordingScheduler(shift=3.0)
    noise = torch.randn(1, tiny.LATENT_CHANNELS, 2, HEIGHT // 8, WIDTH // 8)
    latents = generate(pipeline, control_video=control_video(), latents=noise)
    assert latents.dtype == torch.float32
    assert torch.isfinite(latents).all()
    # Between the steps too: in bf16 small steps would be lost.
    assert torch.equal(pipeline.scheduler.samples[0], noise)
    assert all(not torch.equal(latents, latents.bfloat16().float()) for latents in pipeline.scheduler.samples)


def test_offloading_does_not_change_the_video(parts):
    arguments = {"control_video": control_video(), "num_inference_steps": 2, "output_type": "np"}
    expected = torch.tensor(generate(pipeline_of(parts), **arguments))
    offloaded = pipeline_of(parts)
    offloaded.enable_model_cpu_offload(device="cpu")
    try:
        for _ in range(2):
            assert torch.equal(torch.tensor(generate(offloaded, **arguments)), expected)
    finally:
        offloaded.remove_all_hooks()


def test_a_call_or_a_stream_that_ends_early_frees_the_hooks(parts):
    class Counted(C2RPipeline):
        freed = 0

        def maybe_free_model_hooks(self):
            self.freed += 1
            super().maybe_free_model_hooks()

    def fail(*_):
        raise MemoryError

    pipeline = Counted(scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), **parts)
    pipeline.set_progress_bar_config(disable=True)
    with pytest.raises(MemoryError):
        generate(pipeline, callback_on_step_end=fail)
    assert pipeline.freed == 1
    for _ in pipeline.stream_frames(torch.zeros(1, tiny.LATENT_CHANNELS, 2, 4, 6)):
        break
    assert pipeline.freed == 2


def test_a_failed_call_leaves_no_state_in_a_cache(parts):
    def fail(*_):
        raise MemoryError

    pipeline = pipeline_of(parts, transformer=controlled_transformer())
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e6))
    arguments = {"control_video": control_video(), "num_inference_steps": 2}
    expected = generate(pipeline, **arguments)
    with pytest.raises(MemoryError):
        generate(pipeline, seed=1, callback_on_step_end=fail, **arguments)
    assert torch.equal(generate(pipeline, **arguments), expected)


def test_values_a_little_outside_are_clamped(pipeline):
    control = 1.4 * control_video() - 0.2
    assert control.min() < 0 < 1 < control.max()
    assert torch.equal(
        generate(pipeline, control_video=control), generate(pipeline, control_video=control.clamp(0, 1))
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_frames": 4}, "num_frames is 4: it must be a multiple of 4 plus 1"),
        ({"height": 40}, "divisible by 16"),
        ({"guidance": "sag"}, "guidance is 'sag'"),
        ({"control_guidance_start": 0.5, "control_guidance_end": 0.5}, "control_guidance_start is 0.5"),
        ({"control_guidance_end": 1.5}, "control_guidance_end 1.5"),
        ({"control_video": torch.rand(FRAMES, 3, HEIGHT, 64)}, "control_video has 5 frames of 32x64"),
        ({"control_video": torch.rand(9, 3, HEIGHT, WIDTH)}, "control_video has 9 frames"),
        ({"control_video": torch.zeros(FRAMES, 3, HEIGHT, WIDTH, dtype=torch.int64)}, "int64: expected uint8"),
        ({"control_video": 2 * torch.rand(FRAMES, 3, HEIGHT, WIDTH) - 1}, "values from -1"),
        ({"num_videos_per_prompt": 0}, "num_videos_per_prompt is 0"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs"),
        ({"control_video": torch.rand(3, HEIGHT, WIDTH)}, "control_video has shape"),
        ({"control_video": torch.rand(2, FRAMES, 3, HEIGHT, WIDTH)}, "2 control videos for 1 prompts"),
        ({"prompt": None}, "prompt"),
        ({"latents": torch.zeros(1, 4, 1, 4, 6)}, r"latents has shape \(1, 4, 1, 4, 6\): expected \(1, 4, 2, 4, 6\)"),
    ],
)
def test_bad_arguments_are_named(pipeline, arguments, message):
    with pytest.raises(ValueError, match=message):
        generate(pipeline, **arguments)


def test_wan_2_2_is_refused(parts):
    with pytest.raises(ValueError, match="Wan 2"):
        pipeline_of(parts, boundary_ratio=0.9)


# ------------------------------------------------------------------------------------------------------------- helpers


def test_flow_shift_is_set_in_either_kind_of_scheduler():
    euler = with_flow_shift(FlowMatchEulerDiscreteScheduler(shift=1.0), 5.0)
    unipc = with_flow_shift(
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0), 5.0
    )
    assert (euler.shift, unipc.config.flow_shift) == (5.0, 5.0)
    assert unipc.config.use_flow_sigmas
    with pytest.raises(InputError, match=r"^--flow_shift"):
        with_flow_shift(DDPMScheduler(), 5.0)


def test_prompts_have_512_tokens_or_the_tokenizers_maximum():
    tokenizer = tiny.tiny_tokenizer()
    assert max_sequence_length(tokenizer) == tiny.PROMPT_LENGTH
    tokenizer.model_max_length = int(1e30)
    assert max_sequence_length(tokenizer) == 512
