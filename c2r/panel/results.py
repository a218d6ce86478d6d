"""The buttons of the page, and the videos and lines that they give."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import gradio


@dataclass
class Results:
    """The components that start and show jobs."""

    generate_button: "gradio.Button"
    cancel_button: "gradio.Button"
    control_video: "gradio.Video"
    output_video: "gradio.Video"
    status: "gradio.Markdown"
    command: "gradio.Textbox"
    scales: "gradio.Textbox"
    sweep_button: "gradio.Button"
    grid_video: "gradio.Video"
    grid_status: "gradio.Markdown"


def lay_out_results(control: bool) -> Results:
    """Lay out buttons and videos one below the other, inside a column; without control, its parts are hidden."""
    import gradio as gr

    player = partial(gr.Video, show_label=False, loop=True, autoplay=True, interactive=False)
    with gr.Row():
        generate_button = gr.Button("Generate", variant="primary", scale=3)
        cancel_button = gr.Button("Cancel", scale=1, min_width=100)
    with gr.Row():
        with gr.Column(min_width=320, visible=control):
            gr.Markdown("**Control**, as the model sees it")
            control_video = player(elem_id="control")
        with gr.Column(min_width=320):
            gr.Markdown("**Output**")
            output_video = player(elem_id="output")
    status = gr.Markdown()
    command = gr.Textbox(
        label="The same as a command", buttons=["copy"], max_lines=8, visible=False, elem_id="command"
    )
    with gr.Column(visible=control):
        gr.Markdown("**Comparison** of conditioning scales, with the same seed")
        with gr.Row():
            scales = gr.Textbox("0, 0.5, 1, 1.5", label="Conditioning scales", container=False, scale=3, min_width=140)
            sweep_button = gr.Button("Generate a video for each", scale=2, min_width=100)
        grid_video = player(elem_id="grid")
        grid_status = gr.Markdown()
    return Results(
        generate_button=generate_button,
        cancel_button=cancel_button,
        control_video=control_video,
        output_video=output_video,
        status=status,
        command=command,
        scales=scales,
        sweep_button=sweep_button,
        grid_video=grid_video,
        grid_status=grid_status,
    )
