"""A check of PNG files before FFmpeg decodes them: it inflates texts and colour profiles to up to 2 GiB each."""

import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from c2r.data.drop_reasons import DropReason
from c2r.data.video_info import unusable_video

SIGNATURE = b"\x89PNG\r\n\x1a\n"
#: Chunks that FFmpeg inflates without a limit, besides pictures: a text, and a colour profile.
INFLATED = {b"zTXt", b"iCCP"}
#: Bytes of all these chunks together; the largest colour profiles have a few MiB.
MAX_INFLATED = 32 << 20


def require_small_chunks(path: str | Path, content: BinaryIO) -> None:
    """Check that the texts and the colour profile of a PNG are no larger than MAX_INFLATED; pass any other file.

    Args:
        path: the file, for messages.
        content: its content; left at any position.

    Raises:
        UnusableVideo: they are larger.
    """
    content.seek(0)
    if content.read(8) != SIGNATURE:
        return
    left = MAX_INFLATED
    while len(header := content.read(8)) == 8:
        length, kind = struct.unpack(">I4s", header)
        if kind not in INFLATED:
            content.seek(length + 4, 1)  # and the checksum
            continue
        left -= length
        if left > 0:
            left -= _inflated_length(content.read(length), left)
        if left <= 0:
            detail = f"its texts or colour profile are larger than {MAX_INFLATED >> 20} MiB"
            raise unusable_video(path, detail, DropReason.BEYOND_LIMITS)
        content.seek(4, 1)


def _inflated_length(chunk: bytes, limit: int) -> int:
    """Return the number of bytes that a chunk inflates to, at most `limit`."""
    _, _, compressed = chunk.partition(b"\0")  # a name, and a byte that names the method
    try:
        return len(zlib.decompressobj().decompress(compressed[1:], limit))
    except zlib.error:
        return 0  # FFmpeg leaves such a chunk out
