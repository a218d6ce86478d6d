"""python -m c2r.app: agreement with c2r.generate, limits, messages of one line, and the page in a browser."""

import shlex
import shutil
import socket
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from c2r import InputError, app, cli, generate
from c2r.app import Cancelled, Panel, command_words, labelled, plain_message, prepare_job
from c2r.data.video import read_window
from c2r.data.video_writer import write_video
from c2r.models.assembly import load_transformer
from c2r.models.lora import LoraWeights, save_lora
from c2r.options import APP, GENERATE
from tests.helpers.browser import needs_chromium, started_browser
from tests.helpers.trained import FPS, FRAMES, HEIGHT, WIDTH, save_trained_models
from tests.helpers.videos import encode_video

pytest.importorskip("gradio")

#: What a page sends before a user has touched its fields.
FIELDS = {
    "prompt": "the street",
    "negative_prompt": "",
    "conditioning_scale": 0.9,
    "num_inference_steps": 2,
    "num_frames": FRAMES,
    "seed": 0,
    "guidance": "apg",
    "guidance_scale": 10.0,
    "control_guidance_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
    "follow_control": False,
    "sequence_fps": FPS,
}
OF_PHASE1 = {name: value for name, value in FIELDS.items() if "control" not in name and "cond" not in name}


def noise(seed, num_frames=12, height=HEIGHT, width=WIDTH):
    blocks = np.random.default_rng(seed).integers(0, 256, (num_frames, height // 8, width // 8, 3), dtype=np.uint8)
    return blocks.repeat(8, 1).repeat(8, 2)  # blocks of colour: they survive the codec


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of both phases, coarse.mp4, and a LoRA: loras/style.safetensors."""
    folder = tmp_path_factory.mktemp("models")
    write_video(folder / "coarse.mp4", noise(0), FPS)
    save_trained_models(folder)
    lora = LoraWeights.from_config(LoraWeights.config_of(load_transformer(folder / "base").config, 3))
    for parameter in lora.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(4))
    (folder / "loras").mkdir()
    save_lora(folder / "loras/style.safetensors", lora, comfyui=True)
    return folder


@pytest.fixture(scope="module")
def free_port():
    with socket.create_server(("127.0.0.1", 0)) as free:
        return free.getsockname()[1]


def load_panel(models, phase, folder, *options):
    args = cli.parse(APP, [f"--model={models}/phase{phase}/best", *options])
    given = {name: value for name, value in vars(args).items() if name in GENERATE.options}
    return app.load(args, given, app.check(args), folder)


@pytest.fixture(scope="module")
def panel(models, free_port, tmp_path_factory):
    """Phase 2, loaded."""
    folder = tmp_path_factory.mktemp("panel")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", f"{folder}/page")
        yield load_panel(models, 2, folder, f"--port={free_port}", f"--lora_dir={models}/loras")


def ignore(step, steps, text):
    pass


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
    path, line, command = app.generate_one(panel, job, ignore)
    assert line.startswith(f"Output: seed {changed.get('seed', 0)}, 2 steps")
    program, *words = shlex.split(command)[2:]
    assert program == "c2r.generate"
    monkeypatch.chdir(tmp_path)
    shutil.copy(models / "coarse.mp4", tmp_path)
    generate.main(words)
    assert Path("out.mp4").read_bytes() == Path(path).read_bytes()


def test_a_lora_is_added_for_one_job(models, panel, tmp_path, monkeypatch):
    coarse = f"{models}/coarse.mp4"
    plain = prepare_job(panel, FIELDS, [coarse])
    before = app.generate(panel, plain, ignore)
    assert app.find_loras(panel.args.lora_dir) == ["style.safetensors"]
    assert app.chosen_lora(panel, "", 1) is None
    job = prepare_job(panel, FIELDS, [coarse], app.chosen_lora(panel, "style.safetensors", 0.5))
    frames = app.generate(panel, job, ignore)
    assert np.array_equal(app.generate(panel, plain, ignore), before)
    assert np.abs(frames.astype(int) - before).mean() > 0.5
    monkeypatch.chdir(tmp_path)
    shutil.copy(coarse, tmp_path)
    assert f"--lora {models}/loras/style.safetensors:0.5" in job.command
    generate.main(shlex.split(job.command)[3:])
    # Here it is added to the weights, there beside them: the last bits differ.
    written = read_window("out.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()
    write_video(tmp_path / "page.mp4", frames, FPS)
    shown = read_window("page.mp4", 0.0, FRAMES, FPS, HEIGHT, WIDTH).permute(0, 2, 3, 1).numpy()
    assert np.abs(written.astype(int) - shown).mean() < 0.1
    with pytest.raises(InputError, match="not in --lora_dir"):
        app.chosen_lora(panel, "../lora/model.safetensors", 1)


def test_phase_1_needs_no_coarse_video(models, tmp_path, monkeypatch):
    (tmp_path / "panel").mkdir()
    panel = load_panel(models, 1, tmp_path / "panel", "--height=48")
    path, _, command = app.generate_one(panel, prepare_job(panel, OF_PHASE1, None), ignore)
    assert "--height 48" in command
    monkeypatch.chdir(tmp_path)
    generate.main(shlex.split(command)[3:])
    assert Path("out.mp4").read_bytes() == Path(path).read_bytes()


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
    assert np.array_equal(app.control_pixels(job), frames[:5])
    job = prepare_job(panel, FIELDS | {"sequence_fps": 2 * FPS}, files)
    assert np.array_equal(app.control_pixels(job), frames[::2])
    assert "--sequence_fps 16" in job.command
    with pytest.raises(InputError, match="are missing: 4"):
        prepare_job(panel, FIELDS, files[:4] + files[5:])
    assert [path.name for path in panel.folder.iterdir() if path.name.startswith("tmp")] == []


def test_the_shape_of_a_control_can_be_kept(panel, tmp_path):
    tall = tmp_path / "tall.mp4"
    write_video(tall, noise(2, height=96, width=32), FPS)
    with app.collected_warnings() as warnings:
        assert prepare_job(panel, FIELDS, [str(tall)]).control.shape[2:] == (HEIGHT, WIDTH)
    assert len(warnings) == 1
    assert "of its picture is cropped away" in warnings[0]
    with app.collected_warnings() as warnings:
        assert prepare_job(panel, FIELDS | {"follow_control": True}, [str(tall)]).control.shape[2:] == (64, 16)
    assert warnings == []


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
    monkeypatch.setattr(app, "MAX_SECONDS", 4)
    monkeypatch.setattr(app, "MAX_FRAME_PIXELS", 128 * 127)
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
    shown = plain_message(panel, error.value)
    assert message in shown
    assert "\n" not in shown
    assert str(panel.folder) not in shown
    assert "--" not in shown.replace("--max_upload_mb", "").replace("--fps", "")


def test_a_cancelled_job_runs_no_further_step_and_the_next_one_is_whole(models, panel):
    job = prepare_job(panel, FIELDS | {"num_inference_steps": 4}, [f"{models}/coarse.mp4"])
    calls = []
    before = app.generate(panel, job, lambda step, steps, text: calls.append((step, steps, text)))
    assert calls == [(0, 4, "denoising"), *((step, 4, "denoising") for step in (1, 2, 3)), (4, 4, "decoding")]
    forwards = []
    handle = panel.pipeline.transformer.register_forward_hook(lambda *args: forwards.append(1))

    def cancel_after_two(step, steps, text):
        if step == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        app.generate(panel, job, cancel_after_two)
    handle.remove()
    assert len(forwards) == 2 * 2  # with and without the prompt
    assert np.array_equal(app.generate(panel, job, ignore), before)


def test_only_the_user_of_a_job_cancels_it_and_one_runs_at_a_time(models):
    panel = Panel(None, {}, None, None, Path())
    order, started = [], threading.Event()

    def wait(session):
        with panel.job(session) as cancelled:
            order.append(session)
            started.set()
            assert cancelled.wait(30)

    threads = [threading.Thread(target=wait, args=[session]) for session in ("a", "b")]
    threads[0].start()
    assert started.wait(30)
    threads[1].start()
    while len(panel.jobs) < 2:
        pass
    panel.cancel("c")
    assert order == ["a"]
    assert not any(cancelled.is_set() for cancelled in panel.jobs)
    panel.cancel("b")  # it waits; it is cancelled when it begins
    panel.cancel("a")
    for thread in threads:
        thread.join(30)
    assert order == ["a", "b"]
    assert panel.jobs == {}


def test_a_sweep_is_a_grid_of_the_videos_of_each_scale(models, panel):
    job = prepare_job(panel, FIELDS, [f"{models}/coarse.mp4"])
    steps = []
    grid = app.sweep(panel, job, app.parse_scales("0, 0.5;2"), lambda *values: steps.append(values))
    title = grid.shape[1] // 2 - HEIGHT
    assert grid.shape == (FRAMES, 2 * (HEIGHT + title), 2 * WIDTH, 3)
    cells = [grid[:, y + title : y + title + HEIGHT, x : x + WIDTH] for y in (0, HEIGHT + title) for x in (0, WIDTH)]
    assert np.array_equal(cells[0], app.control_pixels(job))
    for cell, scale in zip(cells[1:], (0, 0.5, 2)):
        alone = prepare_job(panel, FIELDS | {"conditioning_scale": scale}, [f"{models}/coarse.mp4"])
        assert np.array_equal(cell, app.generate(panel, alone, ignore))
    assert len({cell.tobytes() for cell in cells}) == 4
    assert grid[:, :title].std() > 10  # letters
    assert steps[0] == (0, 6, "denoising, scale 0")
    assert steps[-1] == (6, 6, "decoding, scale 2")


def test_a_grid_is_no_wider_than_the_limit_and_even():
    cell = labelled(np.zeros((2, 721, 1281, 3), np.uint8), "scale 1", columns=3)
    assert cell.shape[2] == app.GRID_WIDTH // 3
    assert cell.shape[1] % 2 == cell.shape[2] % 2 == 0


@pytest.mark.parametrize("text", ["", "a", "1, -1", "nan", ", ".join("1234567890")])
def test_bad_scales_are_one_line(text):
    with pytest.raises(InputError, match="Scales"):
        app.parse_scales(text)


def test_every_field_of_the_page_has_a_label_and_an_option(panel):
    assert FIELDS.keys() | {"control_video"} == app.LABELS.keys()
    assert app.LABELS.keys() <= GENERATE.options.keys()
    components = app.build_page(panel).blocks.values()
    assert set(app.LABELS.values()) <= {
        (getattr(component, "label", None) or "").removesuffix(" or picture sequence") for component in components
    }


def test_the_command_refuses_early_in_one_line(models, free_port, monkeypatch, tmp_path):
    monkeypatch.setattr(app, "load", lambda *values: pytest.fail("loads a model"))
    with pytest.raises(InputError, match="--model: missing"):
        app.main([])
    with pytest.raises(InputError, match="absent: no such model folder; check the path"):
        app.main([str(tmp_path / "absent"), f"--port={free_port}"])
    with pytest.raises(InputError, match=r"has no c2r\.json"):
        app.main([str(models / "base"), f"--port={free_port}"])
    with pytest.raises(InputError, match=r"base/config\.json: no such file"):
        app.main([str(models / "phase2/best"), f"--port={free_port}", f"--dinov3={models}/base"])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"--port {port}: another program uses it; give another"):
            app.main([str(models / "phase2/best"), f"--port={port}"])
    with pytest.raises(InputError, match=r"--host 192\.0\.2\.1: nothing can be served there"):
        app.main([str(models / "phase2/best"), "--host=192.0.2.1", f"--port={free_port}"])
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(InputError, match=r"needs gradio \(.*\); pip install gradio=="):
        app.main([str(models / "phase2/best")])


# ------------------------------------------------------------------------------------------------------- in a browser

#: Width and readiness of the video in an element; 2 and above has a frame to show.
VIDEO = "id => {const v = document.querySelector(`#${id} video`); return v && [v.readyState, v.videoWidth, v.src]}"


@pytest.fixture(scope="module")
def address(panel):
    with app.served(panel) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with started_browser() as browser:
        yield browser


@pytest.fixture
def page(browser, address, models):
    """The page with coarse.mp4 uploaded. It fails the test if it asks for anything of another machine."""
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    elsewhere = []
    page.on("request", lambda request: elsewhere.append(request.url) if address not in request.url else None)
    page.goto(address)
    page.locator("input[type=file]").set_input_files(models / "coarse.mp4")
    wait_for_video(page, "control")
    set_number(page, "Steps", 2)
    yield page
    page.close()
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []


def set_number(page, label, value):
    field = page.get_by_label(f"number input for {label}")
    field.fill(str(value))
    field.press("Tab")


def click(page, name):
    page.get_by_role("button", name=name, exact=True).click()


def wait_for_video(page, name):
    """Wait until an element plays a video; return its width in pixels and its address."""
    page.wait_for_function(f"id => (({VIDEO})(id) ?? [0])[0] >= 2", arg=name, timeout=60_000)
    return page.evaluate(VIDEO, name)[1:]


@needs_chromium
@pytest.mark.slow
def test_a_video_is_generated_and_plays_beside_its_control(page, panel):
    assert wait_for_video(page, "control")[0] == WIDTH
    page.get_by_label("Prompt", exact=True).fill("rain")
    click(page, "Generate")
    width, first = wait_for_video(page, "output")
    assert width == WIDTH
    assert "--prompt rain --num_inference_steps 2" in page.locator("#command textarea").input_value()
    page.get_by_label("Seed").fill("1")
    click(page, "Generate")
    page.get_by_text("Output: seed 1, 2 steps").wait_for()
    assert wait_for_video(page, "output")[1] != first
    click(page, "Generate a video for each")
    assert wait_for_video(page, "grid")[0] == 3 * WIDTH
    page.get_by_text("Comparison: seed 1, 2 steps").wait_for()
    assert {path.name for path in (panel.folder / "output").iterdir()} == {"c2r-seed1.mp4"}


@needs_chromium
@pytest.mark.slow
def test_a_bad_file_is_named_and_cancel_or_leaving_ends_a_job(page, panel, models, tmp_path):
    page.locator("#upload").get_by_label("Clear").click()
    (tmp_path / "broken_1_2.mp4").write_bytes(b"no video")
    page.locator("input[type=file]").set_input_files(tmp_path / "broken_1_2.mp4")
    page.get_by_text("broken_1_2.mp4: cannot be decoded").wait_for()
    page.locator("#upload").get_by_label("Clear").click()
    page.locator("input[type=file]").set_input_files(models / "coarse.mp4")
    wait_for_video(page, "control")
    with counted_forwards(panel) as forwards:
        start_a_long_job(page)
        click(page, "Cancel")
        page.get_by_text("Cancelled.").wait_for()
        wait_until_idle(panel)
    assert 0 < len(forwards) < 200
    set_number(page, "Steps", 2)
    click(page, "Generate")
    page.get_by_text("Output: seed 0, 2 steps").wait_for()
    with counted_forwards(panel) as forwards:
        start_a_long_job(page)
        page.close()
        wait_until_idle(panel)
    assert 0 < len(forwards) < 200


@contextmanager
def counted_forwards(panel):
    """Count the forward passes of the transformer, and slow them: a tiny job ends before a click arrives."""
    forwards = []

    def count(*args):
        forwards.append(1)
        time.sleep(0.1)

    handle = panel.pipeline.transformer.register_forward_hook(count)
    yield forwards
    handle.remove()


def start_a_long_job(page):
    set_number(page, "Steps", 100)  # 200 forward passes, with and without the prompt
    click(page, "Generate")
    page.get_by_text("/100 steps").wait_for()


def wait_until_idle(panel):
    until = time.monotonic() + 60
    while panel.jobs:
        assert time.monotonic() < until
        time.sleep(0.01)
