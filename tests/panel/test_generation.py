"""Videos of a job: agreement with c2r.generate, LoRA, cancelling, and the grid of a sweep."""

import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest

from c2r import InputError
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.generate import main
from c2r.panel.generation import Cancelled, generate, parse_scales, sweep
from c2r.panel.grid import GRID_WIDTH, labelled
from c2r.panel.jobs import control_pixels, prepare_job
from c2r.panel.loras import chosen_lora, find_loras
from c2r.panel.videos import generate_one
from tests.helpers.panel import FIELDS, ignore
from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH

OF_PHASE1 = {name: value for name, value in FIELDS.items() if "control" not in name and "cond" not in name}


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"conditioning_scale": 0, "seed": 3, "prompt": "-rain"},
        {"guidance": "cfg", "guidance_scale": 5.0, "negative_prompt": "red brick", "num_frames": 1},
        {"control_guidance_scale": 2.0, "control_guidance_start": 0.5, "guidance_scale": 0},
    ],
)
def test_a_video_is_that_of_the_command_that_the_page_shows(models, panel, tmp_path, monkeypatch, changed):
    job = prepare_job(panel, FIELDS | changed, [f"{models}/coarse.mp4"])
    path, line, command = generate_one(panel, job, ignore)
    assert line.startswith(f"Output: seed {changed.get('seed', 0)}, 2 steps")
    program, *words = shlex.split(command)[2:]
    assert program == "c2r.generate"
    monkeypatch.chdir(tmp_path)
    shutil.copy(models / "coarse.mp4", tmp_path)
    main(words)
    assert Path("out.mp4").read_bytes() == Path(path).read_bytes()


def test_a_lora_is_added_for_one_job(models, panel, tmp_path, monkeypatch):
    coarse = f"{models}/coarse.mp4"
    plain = prepare_job(panel, FIELDS, [coarse])
    before = generate(panel, plain, ignore)
    assert find_loras(panel.args.lora_dir) == ["style.safetensors"]
    assert chosen_lora(panel.args.lora_dir, "", 1) is None
    job = prepare_job(panel, FIELDS, [coarse], chosen_lora(panel.args.lora_dir, "style.safetensors", 0.5))
    frames = generate(panel, job, ignore)
    assert np.array_equal(generate(panel, plain, ignore), before)
    assert np.abs(frames.astype(int) - before).mean() > 0.5
    monkeypatch.chdir(tmp_path)
    shutil.copy(coarse, tmp_path)
    assert f"--lora {models}/loras/style.safetensors:0.5" in job.command
    main(shlex.split(job.command)[3:])
    # Here it is added to the weights, there beside them: the last bits differ.
    written = read_window("out.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()
    write_video(tmp_path / "page.mp4", frames, FPS)
    shown = read_window("page.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()
    assert np.abs(written.astype(int) - shown).mean() < 0.1
    with pytest.raises(InputError, match="not in --lora_dir"):
        chosen_lora(panel.args.lora_dir, "../lora/model.safetensors", 1)


def test_phase_1_needs_no_coarse_video(loaded, tmp_path, monkeypatch):
    (tmp_path / "panel").mkdir()
    panel = loaded(1, tmp_path / "panel", "--height=48")
    path, _, command = generate_one(panel, prepare_job(panel, OF_PHASE1, None), ignore)
    assert "--height 48" in command
    monkeypatch.chdir(tmp_path)
    main(shlex.split(command)[3:])
    assert Path("out.mp4").read_bytes() == Path(path).read_bytes()


def test_a_cancelled_job_runs_no_further_step_and_the_next_one_is_whole(models, panel):
    job = prepare_job(panel, FIELDS | {"num_inference_steps": 4}, [f"{models}/coarse.mp4"])
    calls = []
    before = generate(panel, job, lambda step, steps, text: calls.append((step, steps, text)))
    assert calls == [(0, 4, "denoising"), *((step, 4, "denoising") for step in (1, 2, 3)), (4, 4, "decoding")]
    forwards = []
    handle = panel.pipeline.transformer.register_forward_hook(lambda *args: forwards.append(1))

    def cancel_after_two(step, steps, text):
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        generate(panel, job, cancel_after_two)
    handle.remove()
    assert len(forwards) == 2 * 2  # with and without the prompt
    assert np.array_equal(generate(panel, job, ignore), before)


def test_a_sweep_is_a_grid_of_the_videos_of_each_scale(models, panel):
    job = prepare_job(panel, FIELDS, [f"{models}/coarse.mp4"])
    steps = []
    grid = sweep(panel, job, parse_scales("0, 0.5;2"), lambda *values: steps.append(values))
    title = grid.shape[1] // 2 - HEIGHT
    assert grid.shape == (FRAMES, 2 * (HEIGHT + title), 2 * WIDTH, 3)
    cells = [grid[:, y + title : y + title + HEIGHT, x : x + WIDTH] for y in (0, HEIGHT + title) for x in (0, WIDTH)]
    assert np.array_equal(cells[0], control_pixels(job))
    for cell, scale in zip(cells[1:], (0, 0.5, 2)):
        alone = prepare_job(panel, FIELDS | {"conditioning_scale": scale}, [f"{models}/coarse.mp4"])
        assert np.array_equal(cell, generate(panel, alone, ignore))
    assert len({cell.tobytes() for cell in cells}) == 4
    assert grid[:, :title].std() > 10  # letters
    assert steps[0] == (0, 6, "denoising, scale 0")
    assert steps[-1] == (6, 6, "decoding, scale 2")


def test_a_grid_is_no_wider_than_the_limit_and_even():
    cell = labelled(np.zeros((2, 721, 1281, 3), np.uint8), "scale 1", columns=3)
    assert cell.shape[2] == GRID_WIDTH // 3
    assert cell.shape[1] % 2 == cell.shape[2] % 2 == 0


@pytest.mark.parametrize("text", ["", "a", "1, -1", "nan", ", ".join("1234567890")])
def test_bad_scales_are_one_line(text):
    with pytest.raises(InputError, match="Scales"):
        parse_scales(text)
