"""A check of mp4 and mov files before FFmpeg opens them: it fills its memory with whatever their tables declare."""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from c2r.data.drop_reasons import DropReason
from c2r.data.video_info import MAX_SECONDS, unusable_video

#: Boxes (ISO/IEC 14496-12) that hold the boxes with tables.
FOLDERS = {b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf"}
#: Boxes that a file may begin with.
FIRST_BOXES = {b"ftyp", b"styp", b"moov", b"mdat", b"free", b"skip", b"wide", b"pnot", b"moof", b"sidx", b"uuid"}
#: A day at 120 frames per second.
MAX_SAMPLES = MAX_SECONDS * 120
MAX_BOXES = 1_000_000


def require_honest_tables(path: str | Path, content: BinaryIO) -> None:
    """Check that the tables of an mp4 or mov declare no more samples than the file can hold; pass any other file.

    Args:
        path: the file, for messages.
        content: its content; left at any position.

    Raises:
        UnusableVideo: they declare more samples than the file has bytes, or than MAX_SAMPLES.
    """
    content.seek(0)
    if content.read(8)[4:] not in FIRST_BOXES:
        return
    size = content.seek(0, 2)
    total = 0
    for count in _sample_counts(content, size):
        total += count
        if count > min(size, MAX_SAMPLES) or total > 3 * size:  # up to three tables list each sample
            detail = f"its tables declare {total:,} samples or more, in {size:,} bytes"
            raise unusable_video(path, detail, DropReason.BEYOND_LIMITS)


def _sample_counts(content: BinaryIO, size: int) -> Iterator[int]:
    """Yield the number of samples, or of their times, that each table declares."""
    open_folders, place = [size], 0
    for _ in range(MAX_BOXES):
        while open_folders and place + 8 > open_folders[-1]:
            place = max(place, open_folders.pop())
        if not open_folders:
            return
        content.seek(place)
        header = content.read(24)
        if len(header) < 16:
            return
        length, kind = struct.unpack_from(">I4s", header)
        start = place + 8
        if length == 1:
            length, start = struct.unpack_from(">Q", header, 8)[0], place + 16
        end = open_folders[-1] if length == 0 else min(place + length, open_folders[-1])
        if end < start:
            return
        if kind in FOLDERS:
            open_folders.append(end)
            place = start
            continue
        content.seek(start)
        table = content.read(12)
        if len(table) == 12:
            if kind == b"stsz":
                sample_size, count = struct.unpack_from(">II", table, 4)
                # Sound of constant size is kept in chunks, not in samples.
                yield 0 if sample_size and count * sample_size <= size else count
            elif kind in (b"stz2", b"trun"):
                yield struct.unpack_from(">I", table, 8 if kind == b"stz2" else 4)[0]
            elif kind in (b"stts", b"ctts"):
                entries = min(struct.unpack_from(">I", table, 4)[0], (end - start - 8) // 8)
                content.seek(start + 8)
                counts = np.frombuffer(content.read(8 * entries), ">u4")[::2]
                yield int(counts.sum(dtype=np.int64))
        place = end
