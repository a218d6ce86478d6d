"""The stages of a run on the fake device: what is left out to save time changes no figure."""

from dataclasses import replace

import pytest
import torch

from c2r.data.buckets import Bucket
from c2r.estimation import stages
from c2r.estimation.configs import build_text_encoder
from c2r.estimation.engines import num_bytes
from c2r.estimation.stages import (
    CONTROL,
    SAMPLES,
    SAVING,
    STEP,
    VALIDATION,
    record_generation,
    record_text_encoding,
    record_training,
    record_vae_encoding,
)
from c2r.estimation.step import build_models
from c2r.estimation.tracker import FROZEN, GRADIENTS, OPTIMIZER, SAVED, TRAINABLE
from tests.helpers.estimates import BUCKET, CONFIGS, training_options


def total(recording):
    return sum(recording.peak().values())


@pytest.mark.parametrize("tiling", [False, True])
def test_the_vae_in_brief_has_the_peak_and_the_flops_of_the_whole(tiling, monkeypatch):
    bucket = Bucket(33, 272, 320)  # 9 latent frames, 2 x 2 tiles

    def recordings():
        video = record_generation(CONFIGS, bucket, "cuda", control=None, vae_tiling=tiling)
        return [(r.peak(), r.flops) for r in (video, record_vae_encoding(CONFIGS, bucket, "cuda"))]

    brief = recordings()
    monkeypatch.setattr(stages, "GROUPS_RUN", 1000)
    assert recordings() == brief


def test_each_stage_of_a_process_has_the_state_and_its_own_tensors():
    args = training_options(2)
    recordings = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda")
    assert list(recordings) == [STEP, CONTROL, SAVING, VALIDATION, SAMPLES]
    state = recordings[SAVING].peak()
    assert state[GRADIENTS] == 0
    assert sum(state.values()) - state[FROZEN] - state[TRAINABLE] - state[OPTIMIZER] < 4096  # DINOv3's coordinates
    assert state[OPTIMIZER] == pytest.approx(2 * state[TRAINABLE], rel=0.05)  # small tensors take 512 bytes
    for stage in (STEP, CONTROL, VALIDATION, SAMPLES):
        peak = recordings[stage].peak()
        assert all(peak[kind] >= state[kind] for kind in (FROZEN, TRAINABLE, OPTIMIZER))
        assert sum(peak.values()) > sum(state.values())
    assert recordings[SAMPLES].peak()[FROZEN] > state[FROZEN]  # the VAE
    # Validation is a forward pass alone.
    flops = recordings[STEP].flops
    assert sum(recordings[VALIDATION].flops.values()) == sum(
        count for (name, _), count in flops.items() if name == "forward"
    )


def test_phase_1_has_no_control_and_no_samples():
    args = training_options(1)
    recordings = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda")
    assert list(recordings) == [STEP, SAVING, VALIDATION]


def test_merging_bf16_storage_for_a_checkpoint_needs_room_for_one_weight():
    args = training_options(1, weight_storage="bf16")
    models = build_models(args, CONFIGS)
    largest = max(parameter.numel() for parameter in models.model.parameters())
    peak = record_training(args, models, CONFIGS, BUCKET, "cuda")[SAVING].peak()
    assert 4 * largest <= peak["temporaries"] <= 16 * largest


def test_offloading_and_tiles_lower_the_peak_of_generation():
    bucket = Bucket(9, 480, 832)
    whole, offloaded, tiled, both = (
        total(
            record_generation(
                CONFIGS, bucket, "cuda", control=(2, 1, "blocks"), cpu_offload=offload, vae_tiling=tiling
            )
        )
        for tiling in (False, True)
        for offload in (False, True)
    )
    assert offloaded < whole
    assert both < tiled < whole


def test_a_streamed_text_encoder_has_two_blocks_on_the_device():
    """The one that runs counts as an activation, and the one that is copied next as weights."""
    count = 6
    config = CONFIGS.text_encoder | {"num_layers": count, "d_ff": 4096, "d_model": 256}
    configs = replace(CONFIGS, text_encoder=config)
    whole, streamed = (record_text_encoding(configs, "cuda", streamed=value).peak() for value in (False, True))
    blocks = num_bytes(build_text_encoder(config, torch.bfloat16).encoder.block)
    assert whole[FROZEN] - streamed[FROZEN] == pytest.approx(blocks * (count - 1) / count, rel=0.01)
    assert sum(streamed.values()) < sum(whole.values()) - blocks * (count - 2) / count + blocks / count / 2


def test_the_text_encoder_is_counted_in_half_precision_on_a_gpu():
    gpu, cpu = (record_text_encoding(CONFIGS, device).peak()[FROZEN] for device in ("cuda", "cpu"))
    assert gpu < 0.7 * cpu


def test_activations_that_are_saved_on_the_host_leave_the_device():
    args = training_options(1, gradient_checkpointing="none")
    on_device = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda", step_only=True)[STEP]
    with torch.autograd.graph.save_on_cpu():
        on_host = record_training(args, build_models(args, CONFIGS), CONFIGS, BUCKET, "cuda", step_only=True)[STEP]
    assert on_host.flops == on_device.flops
    assert on_device.host_peak() == 0
    saved, left = on_device.peak()[SAVED], on_host.peak()[SAVED]
    assert left < 0.2 * saved
    assert on_host.host_peak() > 0.8 * saved
