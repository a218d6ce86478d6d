"""Write captions with an image-text-to-text model of transformers."""

from fractions import Fraction

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from c2r import InputError
from c2r.data.video import read_window
from c2r.data.video_info import VideoInfo
from c2r.models.hub import resolve_model_folder

#: Frames that the model looks at: at a quarter, half and three quarters of a clip.
PLACES = (Fraction(1, 4), Fraction(1, 2), Fraction(3, 4))
#: Pixels of the longer side of a frame.
LONGER_SIDE = 640
MAX_NEW_TOKENS = 160


class CaptionModel:
    """A chat model that sees pictures. Weights are read from safetensors; code of the model's folder is never run.

    Args:
        name_or_path: a folder or hub name.
        prompt: the question about the frames.

    Raises:
        InputError: it cannot be loaded, or takes no chat.
    """

    def __init__(self, name_or_path: str, prompt: str):
        folder = str(resolve_model_folder(name_or_path))
        self.prompt = prompt
        self.device = torch.accelerator.current_accelerator() or torch.device("cpu")
        dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        try:
            self.processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False)
            self.model = AutoModelForImageTextToText.from_pretrained(
                folder, trust_remote_code=False, use_safetensors=True, dtype=dtype
            )
        except (OSError, ValueError, KeyError, ImportError) as error:  # transformers' errors for an unfit folder
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"--caption_model {name_or_path}: cannot be loaded as an image-text-to-text model ({reason}); give "
                "one that transformers knows, with safetensors weights"
            ) from error
        if getattr(self.processor, "chat_template", None) is None:
            raise InputError(f"--caption_model {name_or_path}: has no chat template; give an instruction-tuned model")
        self.model.to(self.device).eval()

    @torch.no_grad()
    def caption(self, frames: list[Image.Image]) -> str:
        """Return a caption of frames, without line breaks; the most likely words, so it is the same each time."""
        content = [{"type": "image", "image": frame} for frame in frames] + [{"type": "text", "text": self.prompt}]
        inputs = self.processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        ).to(self.device, dtype=self.model.dtype)  # whole numbers keep their dtype
        tokens = self.model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        answer = self.processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)[0]
        return " ".join(answer.split())


def middle_frames(path: str, info: VideoInfo, start: float, end: float) -> list[Image.Image]:
    """Read the frames of a part of a video that a caption is made from, the right way up.

    Args:
        path: a video, or the name of an image sequence.
        info: its shape.
        start, end: the part, in seconds.

    Raises:
        UnusableVideo: it cannot be decoded.
    """
    width = info.height * info.aspect
    scale = min(1, LONGER_SIDE / max(info.height, width))
    height, width = max(1, round(info.height * scale)), max(1, round(width * scale))
    windows = [read_window(path, start + float(place) * (end - start), 1, 1, height, width) for place in PLACES]
    return [Image.fromarray(window[0].permute(1, 2, 0).numpy()) for window in windows]
