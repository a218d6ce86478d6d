"""The fields of the page, which set options of `c2r.generate`."""

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from c2r.options import GENERATE
from c2r.options.shared import GUIDANCE_SCALES
from c2r.panel.loras import find_loras
from c2r.panel.messages import LABELS
from c2r.panel.model import Panel

if TYPE_CHECKING:
    import gradio

#: Highest value of Steps: it bounds the time for which the others in the queue wait.
MAX_STEPS = 100


@dataclass
class Fields:
    """The components that a user fills in."""

    of_options: dict[str, Any]  #: {option of `c2r.generate`: component}
    upload: "gradio.File"
    lora: "gradio.Dropdown"
    lora_scale: "gradio.Slider"


def lay_out_fields(panel: Panel) -> Fields:
    """Lay out the fields one below the other, inside a column."""
    import gradio as gr

    args, control, defaults = panel.args, panel.has_control, GENERATE.options
    fields: dict[str, Any] = {}

    def add(kind, name, *values, **keywords):
        fields[name] = kind(*values, label=LABELS[name], **keywords)

    half = {"min_width": 140}  # two in a row, on a phone too
    label = f"{LABELS['control_video']} or image sequence"
    upload = gr.File(label=label, file_count="multiple", height=140, visible=control, elem_id="upload")
    add(gr.Textbox, "prompt", lines=3, max_length=2000, placeholder="a rainy street at dusk, brick houses")
    add(gr.Textbox, "negative_prompt", max_length=2000, placeholder="Optional: what to keep away from.")
    if control:
        note = "Strength of the control; 0 ignores the coarse video."
        scale = args.conditioning_scale
        add(gr.Slider, "conditioning_scale", 0, max(2, scale), scale, step=0.05, info=note)
    steps, note = defaults["num_inference_steps"].default, "Fewer are faster, more are finer."
    add(gr.Slider, "num_inference_steps", 1, MAX_STEPS, steps, step=1, info=note)
    with gr.Row():
        note = f"{args.fps:g} per second."
        add(gr.Slider, "num_frames", 1, args.num_frames, args.num_frames, step=4, info=note, **half)
        note = "Same seed, same video."
        add(gr.Number, "seed", 0, precision=0, minimum=0, info=note, **half)
    with gr.Accordion("Guidance", open=False):
        note = "apg: adaptive projected guidance; cfg: classifier-free guidance."
        add(gr.Radio, "guidance", list(GUIDANCE_SCALES), value=args.guidance, info=note)
        note, scale = "How strictly to follow the prompt; 1 is off.", args.guidance_scale
        add(gr.Slider, "guidance_scale", 0, max(20, scale), scale, step=0.5, info=note)
        if control:
            note = "How strictly to follow the coarse video; 1 is off, and faster."
            scale = args.control_guidance_scale
            add(gr.Slider, "control_guidance_scale", 0, max(5, scale), scale, step=0.1, info=note)
            note = "Share of the steps."
            with gr.Row():
                add(gr.Slider, "control_guidance_start", 0, 1, 0, step=0.05, info=note, **half)
                add(gr.Slider, "control_guidance_end", 0, 1, 1, step=0.05, info=note, **half)
    with gr.Accordion("LoRA", open=False, visible=args.lora_dir is not None):
        choices = [("none", ""), *((name, name) for name in find_loras(args.lora_dir or os.devnull))]
        lora = gr.Dropdown(choices, value="", label="LoRA", info=f"Files of {args.lora_dir}.")
        lora_scale = gr.Slider(-1, 2, 1, step=0.05, label="LoRA scale")
    if control:
        with gr.Accordion("Shape and rate of the coarse video", open=False):
            note = f"With as many pixels as {args.height}x{args.width}. Otherwise its edges are cropped."
            add(gr.Checkbox, "follow_control", info=note)
            note = "Rate of uploaded pictures. The output has the model's rate."
            add(gr.Number, "sequence_fps", args.fps, info=note)
    return Fields(fields, upload, lora, lora_scale)
