"""Messages in the words of the page: labels of its fields instead of options."""

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

#: Labels of the fields by the options of `c2r.generate` that they set. Messages about an option name its field.
LABELS = {
    "control_video": "Coarse video",
    "sequence_fps": "Pictures per second",
    "follow_control": "Keep the coarse video's shape",
    "prompt": "Prompt",
    "negative_prompt": "Negative prompt",
    "num_frames": "Frames",
    "seed": "Seed",
    "num_inference_steps": "Steps",
    "conditioning_scale": "Conditioning scale",
    "guidance": "Guidance",
    "guidance_scale": "Text guidance scale",
    "control_guidance_scale": "Control guidance scale",
    "control_guidance_start": "Control starts at",
    "control_guidance_end": "Control ends at",
}


def plain_message(message: object, folder: Path) -> str:
    """Return a message in the words of the page: labels instead of options, and no `folder`, that of the uploads."""
    text = re.sub(rf"{re.escape(str(folder))}/(\S*/)?", "", str(message))
    for remedy in (", or remove its row", "; --num_frames all takes what there is"):  # which the page does not have
        text = text.removesuffix(remedy)
    return re.sub(r"--(\w+)", lambda option: LABELS.get(option[1], option[0]), text)


@contextmanager
def collected_warnings() -> Iterator[list[str]]:
    """Collect the warnings that this thread logs, to show them on the page."""
    messages: list[str] = []
    thread = threading.get_ident()

    class Collector(logging.Handler):
        def emit(self, record):
            if record.thread == thread:
                messages.append(self.format(record))

    handler = Collector(logging.WARNING)
    package = logging.getLogger("c2r")
    package.addHandler(handler)
    try:
        yield messages
    finally:
        package.removeHandler(handler)
