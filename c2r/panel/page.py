"""The page in gradio: its components, and which function each button calls."""

import html
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from c2r import InputError
from c2r.generation.options import default_options
from c2r.panel.fields import Fields, lay_out_fields
from c2r.panel.generation import Cancelled, Report
from c2r.panel.jobs import prepare_job
from c2r.panel.loras import chosen_lora
from c2r.panel.messages import collected_warnings, plain_message
from c2r.panel.model import Panel
from c2r.panel.results import Results, lay_out_results
from c2r.panel.videos import generate_grid, generate_one, show_control

if TYPE_CHECKING:
    import gradio

#: Most jobs that wait.
MAX_QUEUE = 8
#: Seconds between two searches for uploads and videos to delete, and their age then.
DELETE_FILES = (3600, 24 * 3600)


def build_page(panel: Panel) -> "gradio.Blocks":
    """Lay out the page and connect its buttons to the functions of their jobs."""
    import gradio as gr

    with gr.Blocks(title="C2R", analytics_enabled=False, delete_cache=DELETE_FILES) as page:
        gr.Markdown(f"## Coarse video to real-looking video\n{panel.describe()}")
        with gr.Row():
            with gr.Column(scale=4, min_width=320):
                fields = lay_out_fields(panel)
            with gr.Column(scale=7, min_width=320):
                results = lay_out_results(panel.has_control)
        connect(panel, page, fields, results)
    page.queue(max_size=MAX_QUEUE, api_open=False)
    return page


def connect(panel: Panel, page: "gradio.Blocks", fields: Fields, results: Results) -> None:
    """Let the components of a page call their functions."""
    import gradio as gr

    tracked = gr.Progress()  # gradio gives its own to a function that has it as a default

    def on_upload(values):
        return answer(panel, fields, show_control, values) if values[fields.upload] else (None, "")

    def on_generate(values, request: gr.Request, progress=tracked):
        with panel.job(request.session_hash) as cancelled:
            path, line, text = answer(panel, fields, generate_one, values, reporter(progress, cancelled))
            return path, line, gr.Textbox(text, visible=True)

    def on_sweep(values, request: gr.Request, progress=tracked):
        with panel.job(request.session_hash) as cancelled:
            scales = values[results.scales]
            return answer(panel, fields, generate_grid, values, scales, reporter(progress, cancelled))

    def on_guidance(kind):
        return default_options(panel.contract, kind)["guidance_scale"]

    def on_close(request: gr.Request):
        panel.cancel(request.session_hash)

    def on_cancel(request: gr.Request):
        return "Cancelled." if panel.cancel(request.session_hash) else "Nothing to cancel."

    # One job at a time: those of a concurrency_id share its limit. Private: only the page calls them.
    of_options = fields.of_options
    private: dict[str, Any] = {"api_visibility": "private"}
    shared: dict[str, Any] = {
        "inputs": {fields.upload, fields.lora, fields.lora_scale, results.scales, *of_options.values()},
        "concurrency_limit": 1,
        **private,
    }
    video = results.control_video
    if panel.has_control:
        changes = [fields.upload.change, of_options["num_frames"].release]
        changes += [of_options[name].change for name in ("follow_control", "sequence_fps")]
        gr.on(changes, on_upload, outputs=[video, results.status], show_progress_on=video, **shared)
    shared["concurrency_id"] = "job"
    video, outputs = results.output_video, [results.output_video, results.status, results.command]
    one = results.generate_button.click(on_generate, outputs=outputs, show_progress_on=video, **shared)
    video, outputs = results.grid_video, [results.grid_video, results.grid_status]
    grid = results.sweep_button.click(on_sweep, outputs=outputs, show_progress_on=video, **shared)
    results.cancel_button.click(on_cancel, outputs=results.status, cancels=[one, grid], queue=False, **private)
    page.unload(on_close)
    kind, scale = of_options["guidance"], of_options["guidance_scale"]
    kind.change(on_guidance, kind, scale, queue=False, **private)


def answer(panel: Panel, fields: Fields, function: Callable, values: dict, *details: Any) -> tuple:
    """Call a function of a job; add the warnings that it logs to the line that it returns.

    Args:
        panel: the loaded model.
        fields: the fields of the page.
        function: takes panel, job and details; returns a path, a line and possibly more.
        values: {component: value}.
        details: see `function`.

    Raises:
        gradio.Error: the input is bad, the memory is too small, or the user has cancelled.
    """
    with errors_as_messages(panel), collected_warnings() as warnings:
        options = {name: values[field] for name, field in fields.of_options.items()}
        lora = chosen_lora(panel.args.lora_dir, values[fields.lora], values[fields.lora_scale])
        job = prepare_job(panel, options, values[fields.upload], lora)
        path, line, *rest = function(panel, job, *details)
        lines = [line, *(f"⚠ {plain_message(warning, panel.folder)}" for warning in warnings)]
        return path, html.escape("\n\n".join(lines), quote=False), *rest


@contextmanager
def errors_as_messages(panel: Panel) -> Iterator[None]:
    """Show bad input as a message of one line."""
    import gradio as gr
    import torch

    try:
        yield
    except Cancelled:  # gradio no longer waits for it, and would print a traceback
        raise gr.Error("cancelled", visible=False, print_exception=False) from None
    except InputError as error:
        text = plain_message(error, panel.folder)
    except torch.OutOfMemoryError:
        unused = [f"--{name}" for name in ("cpu_offload", "vae_tiling") if not getattr(panel.args, name)]
        text = f"out of memory; restart with {', '.join(unused)}{' or ' if unused else ''}a smaller --num_frames"
    else:
        return
    raise gr.Error(html.escape(text, quote=False), duration=30, print_exception=False)


def reporter(progress: "gradio.Progress", cancelled: threading.Event) -> Report:
    """Return a function that shows progress on the page, and raises `Cancelled` once the user has cancelled."""

    def report(step, steps, text):
        if cancelled.is_set():
            raise Cancelled
        progress((step, steps), desc=text, unit="steps")

    return report
