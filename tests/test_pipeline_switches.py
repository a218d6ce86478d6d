"""Diffusers' switches of a whole C2RPipeline with control: offloading, and caches over the passes of guidance."""

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, MagCacheConfig

from c2r.models.dinov3 import DINOv3FeatureExtractor
from c2r.pipeline import C2RPipeline
from tests.helpers import tiny

FRAMES, HEIGHT, WIDTH = 5, 32, 48
STEPS = 3
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def make_pipeline(text_encoder=None):
    """A pipeline that is given embeddings, as one is that has no room for a text encoder."""
    pipeline = C2RPipeline(
        tiny.tiny_tokenizer(),
        text_encoder,
        tiny.tiny_vae(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
        tiny.tiny_c2r_transformer(2, 2, trained=True).eval(),
        dinov3=DINOv3FeatureExtractor(tiny.tiny_dinov3(), **IMAGENET),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def pipeline():
    return make_pipeline()


@pytest.fixture(scope="module")
def expected():
    return generate(make_pipeline())


def generate(pipeline, frames=FRAMES, **options):
    """Generate with all three passes of guidance."""
    draw = torch.Generator().manual_seed(0)
    embeds = torch.randn(2, 1, tiny.PROMPT_LENGTH, tiny.TEXT_DIM, generator=draw)
    inputs = {
        "control_video": torch.rand(frames, 3, HEIGHT, WIDTH, generator=draw),
        "num_inference_steps": STEPS,
        "control_guidance_scale": 1.5,
        "generator": torch.Generator().manual_seed(1),
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
    }
    return pipeline(**inputs | options, output_type="latent").frames


def offload_layers(pipeline, folder):
    """Do what `enable_sequential_cpu_offload` does, which names the CPU cpu:0, and for Accelerate that is another."""
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            cpu_offload(component, torch.device("cpu"), offload_buffers=len(component._parameters) > 0)


# Offloading to the CPU, with the CPU as the device too. What is not brought back is on "meta", or on the disk.
OFFLOADING = {
    "models": lambda pipeline, folder: pipeline.enable_model_cpu_offload(device="cpu"),
    "layers": offload_layers,
    "leaves to disk": lambda pipeline, folder: pipeline.enable_group_offload(
        torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=folder
    ),
    "blocks to disk": lambda pipeline, folder: pipeline.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=folder
    ),
}


@pytest.mark.parametrize("offloading", OFFLOADING)
def test_offloading_changes_no_video(pipeline, expected, tmp_path, offloading):
    OFFLOADING[offloading](pipeline, tmp_path)
    for _ in range(2):
        # Weights from the disk lie at other addresses, at which kernels may sum in another order.
        torch.testing.assert_close(generate(pipeline), expected, atol=1e-3, rtol=1e-3)


def test_leaves_of_a_text_encoder_on_disk_are_refused(tmp_path):
    pipeline = make_pipeline(tiny.tiny_text_encoder())
    options = {"offload_type": "leaf_level", "offload_to_disk_path": tmp_path}
    with pytest.raises(ValueError, match=r"^offload_to_disk_path .* exclude_modules=\"text_encoder\"$"):
        pipeline.enable_group_offload(torch.device("cpu"), **options)
    pipeline.enable_group_offload(torch.device("cpu"), exclude_modules="text_encoder", **options)
    assert not hasattr(pipeline.text_encoder.shared, "_diffusers_hook")


def contexts(pipeline):
    """Return the names of the cache's states, one per pass."""
    hooks = pipeline.transformer.transformer.blocks[0]._diffusers_hook.hooks
    (hook,) = (hook for name, hook in hooks.items() if "leader" in name)
    return set(hook.state_manager._state_cache)


@pytest.mark.parametrize("windows", [False, True])
def test_each_pass_of_each_window_has_a_context_of_its_own(pipeline, windows):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    seen = []

    def look(pipeline, step, timestep, tensors):
        seen.append(contexts(pipeline))
        return tensors

    longer = {"frames": 13, "window_frames": 9} if windows else {}
    generate(pipeline, callback_on_step_end=look, **longer)
    assert [len(names) for names in seen] == [6 if windows else 3] * STEPS
    assert contexts(pipeline) == set()  # the end of a call forgets the video

    seen.clear()
    generate(pipeline, callback_on_step_end=look, control_guidance_end=1 / STEPS, **longer)
    # From the second step on there is no control: nothing of the controlled steps is used again.
    with_control, without = seen[0], seen[-1] - seen[0]
    assert len(with_control) == (6 if windows else 3)
    assert len(without) == (4 if windows else 2)  # and so no pass of control guidance


def test_a_cache_that_never_skips_changes_nothing_and_one_that_does_repeats(pipeline, expected):
    pipeline.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    assert torch.equal(generate(pipeline), expected)
    pipeline.transformer.disable_cache()

    ratios = [1.0] * STEPS
    config = MagCacheConfig(threshold=1e9, retention_ratio=0.0, num_inference_steps=STEPS, mag_ratios=ratios)
    pipeline.transformer.enable_cache(config)
    first = generate(pipeline)
    assert not torch.allclose(first, expected, atol=1e-2)
    assert torch.equal(generate(pipeline), first)
    pipeline.transformer.disable_cache()
    assert torch.equal(generate(pipeline), expected)
