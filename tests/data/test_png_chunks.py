"""PNG files of 100 kB whose texts or colour profiles have gigabytes are refused before FFmpeg inflates them."""

import io
import struct
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from c2r.data.drop_reasons import DropReason
from c2r.data.png_chunks import MAX_INFLATED, require_small_chunks
from c2r.data.video import UnusableVideo, probe, read_window


def png(kind, size):
    """Return a PNG of 64 x 48 pixels with a chunk after its picture that inflates to this many bytes."""
    file = io.BytesIO()
    Image.fromarray(np.full((48, 64, 3), 90, np.uint8)).save(file, "PNG")
    content = file.getvalue()
    compressor = zlib.compressobj(9)
    data = b"name\0\0" + b"".join(compressor.compress(bytes(1 << 20)) for _ in range(size >> 20)) + compressor.flush()
    chunk = struct.pack(">I4s", len(data), kind) + data + struct.pack(">I", zlib.crc32(kind + data))
    end = content.index(b"IEND") - 4
    return content[:end] + chunk + content[end:]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
@pytest.mark.parametrize("name", ["a.png", "renamed.mp4"])
def test_a_chunk_that_inflates_to_too_much_is_refused(tmp_path, kind, name):
    path = tmp_path / name
    path.write_bytes(png(kind, 2 * MAX_INFLATED))
    for read in (lambda: probe(path), lambda: read_window(path, 0, 1, 16, 48, 64)):
        with pytest.raises(UnusableVideo, match="its texts or colour profile are larger than 32 MiB") as error:
            read()
        assert error.value.reason == DropReason.BEYOND_LIMITS
    path.write_bytes(png(b"zTXt", 1 << 20))
    assert read_window(path, 0, 1, 16, 48, 64).min() == 90


def test_the_chunks_of_a_film_of_pngs_are_checked(tmp_path):
    pictures = [png(b"zTXt", 0), png(b"zTXt", 0), png(b"zTXt", 2 * MAX_INFLATED)]
    with av.open(str(tmp_path / "a.mov"), "w") as container:
        stream = container.add_stream("png", rate=16)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "rgb24"
        for number, content in enumerate(pictures):
            packet = av.Packet(content)
            packet.stream, packet.pts, packet.dts, packet.time_base = stream, number, number, Fraction(1, 16)
            container.mux(packet)
    assert read_window(tmp_path / "a.mov", 0, 1, 16, 48, 64).min() == 90
    with pytest.raises(UnusableVideo, match="its texts or colour profile are larger than 32 MiB"):
        read_window(tmp_path / "a.mov", 0, 3, 16, 48, 64)


def test_other_files_and_cut_off_ones_pass():
    for content in (b"", b"GIF89a", png(b"zTXt", 0)[:50], png(b"zTXt", 0) + b"\xff" * 20):
        require_small_chunks("a.png", io.BytesIO(content))
