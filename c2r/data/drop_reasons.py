"""Reasons why a row of a dataset's metadata gives no clips."""

from dataclasses import dataclass
from enum import StrEnum


class DropReason(StrEnum):
    """The reasons that reports, lists of rows and failure notes give; docs/data.md explains them to users."""

    # The row itself.
    EMPTY_CAPTION = "empty caption"  #: the row has no text, or only spaces
    DUPLICATE_ROW = "duplicate row"  #: an earlier row names the same files with the same caption
    MISSING_FILE = "missing file"  #: there is no file of this name, or the row names none
    BAD_PART = "no part of the file"  #: start and end are no times, or the end is not after the start
    OUTSIDE_FOLDER = "path outside the folder"  #: the name, or a link, leads out of the dataset's folder

    # An image sequence.
    MISSING_FRAMES = "missing frames"  #: numbers are absent between the first and the last picture
    NO_RATE = "sequence without a rate"  #: neither the row nor --sequence_fps gives one

    # One file.
    UNREADABLE = "unreadable"  #: the file cannot be opened or decoded, or was cut off
    NO_VIDEO_STREAM = "no video stream"  #: the file holds no video, perhaps only sound
    BEYOND_LIMITS = "beyond the limits"  #: too many pixels, too long or too narrow, see `c2r.data.video`
    UNKNOWN_COLOURS = "unknown colours"  #: they cannot be converted to sRGB, see `c2r.data.colour`
    FROZEN = "frozen"  #: fewer than a quarter of a clip's frames would be new pictures
    DAMAGED = "damaged"  #: a window holds frames that the decoder had to guess
    NOT_A_FILE = "not a file"  #: a pipe, device or folder has this name
    IMAGE = "image"  #: the file is an image, and no bucket has one frame
    TOO_SHORT = "too short"  #: fewer frames than the shortest bucket of its aspect ratio
    TOO_FEW_RESAMPLED_FRAMES = "too few frames after resampling"  #: enough frames at its own rate, too few at --fps
    NON_FINITE_LATENTS = "non-finite latents"  #: the VAE gives NaN or infinity for it; set by the encoding pass

    # A video and its control.
    PAIR_LENGTH = "pair differs in length"  #: their durations differ by more than one and a half frames
    PAIR_RATE = "pair differs in rate"  #: their frame rates differ by more than 0.5 %
    PAIR_ASPECT = "pair differs in aspect"  #: their aspect ratios differ by more than 1 %
    PAIR_OF_KINDS = "pair of an image and a video"  #: one of the two is an image


class DropRow(Exception):
    """Raised for a row that gives no clips; the manifest lists it as dropped, with this reason and detail."""

    def __init__(self, reason: DropReason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class DroppedRow:
    """A metadata row, or one window of it, that is not used; or a row that is used without its coarse version."""

    file: str
    reason: DropReason
    detail: str = ""
    window: int | None = None  # 0, 1, … within the file; None: all of them
