"""The page, in a browser."""

import time
from contextlib import contextmanager

import pytest

from c2r.options import GENERATE
from c2r.panel.messages import LABELS
from c2r.panel.page import build_page
from c2r.panel.server import served
from tests.helpers.browser import needs_chromium, started_browser
from tests.helpers.panel import FIELDS
from tests.helpers.trained import WIDTH

pytest.importorskip("gradio")

#: Width and readiness of the video in an element; 2 and above has a frame to show.
VIDEO = "id => {const v = document.querySelector(`#${id} video`); return v && [v.readyState, v.videoWidth, v.src]}"


def test_every_field_of_the_page_has_a_label_and_an_option(panel):
    assert FIELDS.keys() | {"control_video"} == LABELS.keys()
    assert LABELS.keys() <= GENERATE.options.keys()
    components = build_page(panel).blocks.values()
    assert set(LABELS.values()) <= {
        (getattr(component, "label", None) or "").removesuffix(" or image sequence") for component in components
    }


@pytest.fixture(scope="module")
def address(panel):
    with served(panel) as address:
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
