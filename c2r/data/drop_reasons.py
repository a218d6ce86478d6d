"""Reasons why a row of a dataset's metadata gives no clips."""

from enum import StrEnum


class DropReason(StrEnum):
    """The reasons that reports, manifests and failure notes name; docs/data.md lists them."""

    # The row itself.
    EMPTY_CAPTION = "empty caption"  #: the row has no text, or only spaces
    DUPLICATE_ROW = "duplicate row"  #: an earlier row names the same files with the same caption
    MISSING_FILE = "missing file"  #: there is no file of this name, or the row names none
    OUTSIDE_FOLDER = "path outside the folder"  #: the name, or a link, leads out of the dataset's folder

    # One file.
    UNREADABLE = "unreadable"  #: no decoder can read the file; it may be damaged or cut off
    NO_VIDEO_STREAM = "no video stream"  #: the file holds no moving picture, but perhaps sound
    BEYOND_LIMITS = "beyond the limits"  #: more pixels, a longer duration or a narrower shape than is accepted
    IMAGE = "image"  #: the file is an image, and no bucket has one frame
    TOO_SHORT = "too short"  #: the file has fewer frames than the shortest bucket of its shape
    TOO_FEW_RESAMPLED_FRAMES = "too few frames after resampling"  #: long enough at its own rate, but not at --fps
    NON_FINITE_LATENTS = "non-finite latents"  #: the VAE gives NaN or infinity for it; set by the encoding pass

    # A video and its control.
    PAIR_LENGTH = "pair differs in length"  #: their durations differ by more than one and a half frames
    PAIR_RATE = "pair differs in rate"  #: their frame rates differ by more than 0.5 %
    PAIR_ASPECT = "pair differs in aspect"  #: their aspect ratios differ by more than 1 %
    PAIR_OF_KINDS = "pair of an image and a video"  #: one of the two is an image


class DropRow(Exception):
    """Raised while a row is examined: the manifest lists the row as dropped, with this reason and detail."""

    def __init__(self, reason: DropReason, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail
