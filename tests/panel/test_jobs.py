"""Jobs: commands, pictures and videos that are uploaded, limits, messages of one line."""

import shutil
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from c2r import InputError
from c2r.data.video_writer import write_video
from c2r.panel import uploads as limits
from c2r.panel.jobs import command_words, control_pixels, prepare_job
from c2r.panel.messages import LABELS, collected_warnings, plain_message
from c2r.panel.page import build_page
from tests.helpers.panel import FIELDS, noise
from tests.helpers.trained import FPS, HEIGHT, WIDTH
from tests.helpers.videos import encode_video


def test_a_command_leaves_out_defaults_but_no_zeros():
    fields = {"prompt": "", "seed": 0, "guidance_scale": None, "negative_prompt": "", "follow_control": False}
    assert command_words(fields) == ["--prompt", ""]
    words = command_words({"prompt": "-a", "conditioning_scale": 0, "follow_control": True})
    assert words == ["--prompt=-a", "--conditioning_scale", "0", "--follow_control"]


def test_pictures_are_read_as_a_video_at_their_rate(panel, tmp_path):
    frames, files = noise(1, 9), []
    for number, frame in enumerate(frames):
        path = tmp_path / f"{number}" / f"shot_{number:03d}.png"  # as gradio saves them: a folder for each
        path.parent.mkdir()
        Image.fromarray(frame).save(path)
        files.append(str(path))
    job = prepare_job(panel, FIELDS, files[::-1])
    assert np.array_equal(control_pixels(job), frames[:5])
    job = prepare_job(panel, FIELDS | {"sequence_fps": 2 * FPS}, files)
    assert np.array_equal(control_pixels(job), frames[::2])
    assert "--sequence_fps 16" in job.command
    with pytest.raises(InputError, match="are missing: 4"):
        prepare_job(panel, FIELDS, files[:4] + files[5:])
    assert [path.name for path in panel.folder.iterdir() if path.name.startswith("tmp")] == []


def test_the_shape_of_a_control_can_be_kept(panel, tmp_path):
    tall = tmp_path / "tall.mp4"
    write_video(tall, noise(2, height=96, width=32), FPS)
    with collected_warnings() as warnings:
        assert prepare_job(panel, FIELDS, [str(tall)]).control.shape[2:] == (HEIGHT, WIDTH)
    assert len(warnings) == 1
    assert "of its picture is cropped away" in warnings[0]
    with collected_warnings() as warnings:
        assert prepare_job(panel, FIELDS | {"follow_control": True}, [str(tall)]).control.shape[2:] == (64, 16)
    assert warnings == []


def test_the_guidance_of_training_is_at_first_in_the_fields_and_not_in_the_command(panel, models, monkeypatch):
    def command(**changed):
        return prepare_job(panel, FIELDS | changed, [f"{models}/coarse.mp4"]).command

    as_trained = {"guidance": "cfg", "guidance_scale": 2.0, "control_guidance_scale": 1.5}
    monkeypatch.setattr(panel, "contract", replace(panel.contract, **as_trained))
    assert "guidance" not in command(**as_trained)
    assert "--guidance apg --control_guidance_scale 1.0" in command()
    assert "--guidance apg --guidance_scale 2.0" in command(guidance="apg", guidance_scale=2.0)
    assert "--guidance_scale 10.0" in command(guidance="cfg", guidance_scale=10.0)
    monkeypatch.setattr(panel, "args", Namespace(**vars(panel.args) | as_trained))
    components = build_page(panel).blocks.values()
    shown = {getattr(component, "label", None): getattr(component, "value", None) for component in components}
    assert {name: shown[LABELS[name]] for name in as_trained} == as_trained


@pytest.fixture
def uploads(panel, models, tmp_path, monkeypatch):
    """Files as if they had been uploaded, and low limits."""
    folder = panel.folder / "uploads"
    (folder / "a").mkdir(parents=True)
    (folder / "b").mkdir()
    for name in ("a/coarse.mp4", "b/coarse.mp4"):
        shutil.copy(models / "coarse.mp4", folder / name)
    (folder / "broken.mp4").write_bytes(b"no video")
    Image.new("RGB", (64, 32)).save(folder / "one_1.png")
    shutil.copy(folder / "one_1.png", folder / "a/one_1.png")
    Image.new("RGB", (64, 32)).save(folder / "still.png")
    write_video(folder / "short.mp4", noise(3, 3), FPS)
    write_video(folder / "large.mp4", noise(3, 8, 128, 128), FPS)
    encode_video(folder / "long.mp4", noise(3, 40), fps=FPS)
    monkeypatch.setattr(limits, "MAX_SECONDS", 4)
    monkeypatch.setattr(limits, "MAX_FRAME_PIXELS", 128 * 127)
    monkeypatch.setattr(panel.args, "max_upload_mb", 1)
    with open(folder / "heavy.mp4", "wb") as file:
        file.truncate(1_000_001)
    yield folder
    shutil.rmtree(folder)


BAD_INPUT = [
    ({}, [], "Coarse video: missing; upload a video"),
    ({}, ["broken.mp4"], "broken.mp4: cannot be decoded"),
    ({}, ["one_1.png"], "Coarse video one_1.png: one picture, but Frames is 5"),
    ({}, ["one_1.png", "still.png"], "Coarse video upload"),
    ({}, ["one_1.png", "a/one_1.png"], "Coarse video one_1.png: uploaded twice"),
    ({}, ["a/coarse.mp4", "b/coarse.mp4"], "Coarse video coarse.mp4: is no picture"),
    ({}, ["short.mp4"], "short.mp4: gives 3 frames at 8 fps, but Frames is 5; give a longer video, or lower Frames"),
    ({}, ["long.mp4"], "Coarse video long.mp4: 5 s long, above 4 s"),
    ({}, ["large.mp4"], "Coarse video large.mp4: 128x128 pixels"),
    ({}, ["heavy.mp4"], "Coarse video: 1 MB, above 1 MB"),
    ({"num_frames": 9}, ["a/coarse.mp4"], "Frames 9: more than 5"),
    ({"num_frames": 4}, ["a/coarse.mp4"], "Frames 4: must be 4k + 1"),
    ({"seed": 2**31}, ["a/coarse.mp4"], "Seed 2147483648: out of range"),
    ({"sequence_fps": -1}, ["a/coarse.mp4"], "Pictures per second -1: "),
    ({"guidance_scale": -1}, ["a/coarse.mp4"], "Text guidance scale -1: "),
    (
        {"control_guidance_start": 0.8, "control_guidance_end": 0.2},
        ["a/coarse.mp4"],
        "Control starts at 0.8: not below Control ends at 0.2",
    ),
]


@pytest.mark.parametrize(("changed", "files", "message"), BAD_INPUT)
def test_bad_input_is_one_line_in_the_words_of_the_page(panel, uploads, changed, files, message):
    with pytest.raises(InputError) as error:
        prepare_job(panel, FIELDS | changed, [str(uploads / file) for file in files])
    shown = plain_message(error.value, panel.folder)
    assert message in shown
    assert "\n" not in shown
    assert str(panel.folder) not in shown
    assert "--" not in shown.replace("--max_upload_mb", "").replace("--fps", "")
