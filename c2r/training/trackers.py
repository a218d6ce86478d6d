"""The trackers that get a run's numbers, pictures and videos: TensorBoard, Weights & Biases and trackio.

All are Accelerate's. TensorBoard can take points back that a killed run has logged after its checkpoint; the other two
cannot, so a resumed run logs there only what is new.
"""

import json
import os
import uuid
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker, on_main_process
from PIL import Image
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from c2r import InputError
from c2r.data.contact_sheet import image_bytes
from c2r.files import read_json, write_atomic
from c2r.options.training_checks import chosen_trackers
from c2r.training.record import RecordTracker

#: Width of a video in TensorBoard, in pixels.
GIF_WIDTH = 960

#: File in the output folder that names the run in each tracker, so that a resumed run goes on in the same one.
IDS = "trackers.json"


def build_trackers(accelerator: Accelerator, args: Namespace, purge_step: int, resumed: bool) -> list[GeneralTracker]:
    """Build the trackers that `Accelerator.init_trackers` starts.

    Args:
        accelerator: the run's.
        args: options of the run.
        purge_step: what an earlier start has logged at this step or later is removed, or not logged again.
        resumed: the run continues from a checkpoint, in the same runs of the trackers.
    """
    out, names = Path(args.output_dir), chosen_trackers(args.report_to)
    record = RecordTracker(out, purge_step)
    trackers: list[GeneralTracker] = [record]
    if not accelerator.is_main_process:
        return trackers
    if "tensorboard" in names:
        trackers.append(_TensorBoard("", accelerator.logging_dir, purge_step=purge_step))
    ids = read_json(out / IDS, dict[str, str]) if resumed and (out / IDS).is_file() else {}
    for name, kind in (("wandb", _Wandb), ("trackio", _Trackio)):
        if name in names:
            new = name not in ids
            ids.setdefault(name, f"{out.absolute().name}-{uuid.uuid4().hex[:8]}")
            trackers.append(kind(ids[name], out, None if new else record))
    if ids:
        write_atomic(out / IDS, json.dumps(ids, sort_keys=True).encode())
    return trackers


def require_logins(args: Namespace) -> None:
    """Check that the trackers of --report_to can log in, as far as this machine knows. Call it on the main process.

    Raises:
        InputError: wandb has no key.
    """
    if "wandb" not in chosen_trackers(args.report_to):
        return
    import wandb

    online = wandb.setup().settings.mode in ("online", "shared")
    if online and not wandb.login(prompt=False, verify=False):
        raise InputError(
            "--report_to wandb: this machine is not logged in; run wandb login, or set WANDB_MODE=offline"
        )


#: Charts of TensorBoard's tab "Custom scalars": the numbers that belong together, in one chart.
LAYOUT = {
    "Is it learning?": {
        "validation loss": [
            "Multiline",
            ["validation/loss$", "validation/loss_other_control", "validation/loss_no_control"],
        ],
        "gains": ["Multiline", ["validation/control_gain$", "validation/prompt_gain$"]],
        "control gain by noise level": ["Multiline", ["validation/control_gain_sigma_.*"]],
        "leak": ["Multiline", ["validation/leak_share_.*"]],
        "CG look": ["Margin", ["monitor/cg_look", "monitor/cg_look_low", "monitor/cg_look_high"]],
        "CG share": ["Multiline", ["train/cg_share", "monitor/cg_ratio"]],
    }
}


class _TensorBoard(TensorBoardTracker):
    """Accelerate's tracker, with the options in the run itself: Accelerate makes them two runs of their own."""

    @on_main_process
    def store_init_configuration(self, values: dict[str, Any]):
        for summary in hparams(values, {}):
            self.writer.file_writer.add_summary(summary)
        self.writer.add_custom_scalars(LAYOUT)
        rows = "\n".join(f"| {name} | {str(value).replace('|', '&#124;')} |" for name, value in values.items())
        self.writer.add_text("options", f"| option | value |\n|---|---|\n{rows}", 0)
        self.writer.flush()


class _AppendOnly:
    """Leaves out what an earlier start of the run has logged to a tracker that cannot take it back."""

    def __init__(self, identifier: str, folder: Path, record: RecordTracker | None):
        """Take the name of the run in the tracker, the output folder, and the record of the earlier start, if any."""
        self.identifier, self.folder, self.record = identifier, folder, record

    def is_new(self, name: str, step: int) -> bool:
        """Return True unless this number, picture or video was logged at this step or later."""
        return self.record is None or step > self.record.logged.get(name, -1)

    def new(self, values: dict[str, Any], step: int) -> dict[str, Any]:
        """Return the values that are new at this step."""
        return {name: value for name, value in values.items() if self.is_new(name, step)}


class _Wandb(_AppendOnly, WandBTracker):
    def __init__(self, identifier: str, folder: Path, record: RecordTracker | None):
        _AppendOnly.__init__(self, identifier, folder, record)
        WandBTracker.__init__(self, os.environ.get("WANDB_PROJECT", "c2r"))

    @on_main_process
    def start(self):
        import wandb

        self.init_kwargs = {"id": self.identifier, "name": os.environ.get("WANDB_NAME", self.folder.absolute().name)}
        if "WANDB_DIR" not in os.environ:
            self.init_kwargs["dir"] = str(self.folder)
        # Offline there is nothing to resume, and wandb warns about the argument: `wandb sync` joins runs by their id.
        if wandb.setup().settings.mode in ("online", "shared"):
            self.init_kwargs["resume"] = "allow"
        try:
            super().start()
        except wandb.errors.Error as error:
            raise InputError(
                f"--report_to wandb: {' '.join(str(error).split())}; run wandb login, or set WANDB_MODE=offline"
            ) from error
        # A step of its own: that of wandb may not go back, and a resumed run validates an earlier step once more.
        self.run.define_metric("global_step", hidden=True)
        self.run.define_metric("*", step_metric="global_step")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs):
        assert step is not None
        if new := self.new(values, step):
            self.run.log(new | {"global_step": step}, **kwargs)

    def log_picture(self, name: str, picture: np.ndarray, step: int):
        import wandb

        self.log({name: wandb.Image(picture)}, step)

    def log_video(self, name: str, path: Path, step: int, caption: str):
        import wandb

        self.log({name: wandb.Video(str(path), caption=caption, format="mp4")}, step)


class _Trackio(_AppendOnly, TrackioTracker):
    def __init__(self, identifier: str, folder: Path, record: RecordTracker | None):
        _AppendOnly.__init__(self, identifier, folder, record)
        TrackioTracker.__init__(self, os.environ.get("TRACKIO_PROJECT", "c2r"), name=identifier, resume="allow")

    @on_main_process
    def log(self, values: dict[str, Any], step: int | None = None, **kwargs):
        assert step is not None
        if new := self.new(values, step):
            self.run.log(new, step=step, **kwargs)

    def log_picture(self, name: str, picture: np.ndarray, step: int):
        import trackio

        self.log({name: trackio.Image(picture)}, step)

    def log_video(self, name: str, path: Path, step: int, caption: str):
        import trackio

        self.log({name: trackio.Video(str(path), caption=caption)}, step)


def tensorboard_writer(accelerator: Accelerator) -> SummaryWriter | None:
    """Return the run's TensorBoard writer; None on other processes and without `--report_to tensorboard`."""
    return next((tracker.tracker for tracker in accelerator.trackers if tracker.name == "tensorboard"), None)


def record_of(accelerator: Accelerator) -> RecordTracker | None:
    """Return the run's record; None on other processes and before the run has started."""
    return next((tracker for tracker in accelerator.trackers if isinstance(tracker, RecordTracker)), None)


def log_picture(accelerator: Accelerator, name: str, picture: np.ndarray, step: int) -> None:
    """Log a picture to all trackers. Call it on the main process only.

    Args:
        accelerator: the run's.
        name: such as "samples/sheet".
        picture: (H, W, 3) uint8 RGB.
        step: the optimizer step.
    """
    if (writer := tensorboard_writer(accelerator)) is not None:
        writer.add_image(name, picture, step, dataformats="HWC")
    for tracker in _media_trackers(accelerator, name, step):
        tracker.log_picture(name, picture, step)
    if (record := record_of(accelerator)) is not None:
        record.log_media(name, step)


def log_video(
    accelerator: Accelerator,
    name: str,
    path: Path,
    frames: np.ndarray,
    fps: float,
    step: int,
    caption: str,
) -> None:
    """Log a video to all trackers: as a GIF to TensorBoard, which plays no others. Call it on the main process only.

    Args:
        accelerator: the run's.
        name: such as "samples/0".
        path: an mp4 of the frames.
        frames: (F, H, W, 3) uint8 RGB.
        fps: frames per second.
        step: the optimizer step.
        caption: text below the video; TensorBoard has no place for it.
    """
    if (writer := tensorboard_writer(accelerator)) is not None:
        _log_gif(writer, name, frames, fps, step)
    for tracker in _media_trackers(accelerator, name, step):
        tracker.log_video(name, path, step, caption)
    if (record := record_of(accelerator)) is not None:
        record.log_media(name, step, caption)


def _media_trackers(accelerator, name, step):
    """Return the trackers besides TensorBoard to which this picture or video is new."""
    return [t for t in accelerator.trackers if isinstance(t, _Wandb | _Trackio) and t.is_new(name, step)]


def _log_gif(writer, tag, frames, fps, step):
    """Log (F, H, W, 3) uint8 frames; `SummaryWriter.add_video` would need moviepy."""
    from tensorboard.compat.proto.summary_pb2 import Summary

    images = [Image.fromarray(frame) for frame in frames]
    for image in images:
        image.thumbnail((GIF_WIDTH, GIF_WIDTH))
    gif = image_bytes(images[0], "GIF", save_all=True, append_images=images[1:], duration=1000 / fps, loop=0)
    width, height = images[0].size
    picture = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=gif)
    writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=picture)]), step)
