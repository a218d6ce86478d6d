"""The times of frames: rates, last frames, interlacing; lost data and slow videos drop the windows they affect."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image

from c2r.data.drop_reasons import DropReason
from c2r.data.manifest import read_manifest
from c2r.data.video import UnusableVideo, probe, read_window
from tests.helpers.settings import clip_settings
from tests.helpers.videos import counter_frames, encode_video, read_counter

QUIET = {"x265-params": "log-level=none"}


def moving_bar(moment, height=96, width=128):
    """Return an (H, W, 3) picture of a bar that moves 6 pixels per moment."""
    rows = np.full((height, width, 3), 40, np.uint8)
    x = (8 + 6 * moment) % (width - 16)
    rows[:, x : x + 12] = 220
    return rows


def weave(first, second):
    """Return a picture whose even rows are of the first moment, and whose odd rows of the second."""
    picture = first.copy()
    picture[1::2] = second[1::2]
    return picture


def line_difference(window):
    """Return the mean difference of a line from the mean of its neighbours, for each frame: high for combs."""
    luma = window.numpy().astype(float).mean(1)
    return np.abs(luma[:, 1:-1] - (luma[:, :-2] + luma[:, 2:]) / 2).mean((1, 2))


INTERLACED = {
    "camera.mp4": ("libx264", {"crf": "8", "flags": "+ilme+ildct", "x264-params": "tff=1"}),
    "dvd.mpg": ("mpeg2video", {"flags": "+ilme+ildct", "b": "8M"}),
    "broadcast.ts": ("mpeg2video", {"flags": "+ilme+ildct", "b": "8M"}),
    "studio.mov": ("prores_ks", {"flags": "+ilme+ildct"}),
}


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", INTERLACED)
def test_interlaced_frames_have_no_combs_and_keep_their_times(tmp_path, name, late):
    codec, options = INTERLACED[name]
    with av.open(str(tmp_path / name), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.width, stream.height = 128, 96
        stream.pix_fmt = "yuv422p10le" if "prores" in codec else "yuv420p"
        for n in range(40):
            frame = av.VideoFrame.from_ndarray(weave(moving_bar(2 * n), moving_bar(2 * n + 1)), "rgb24")
            frame = frame.reformat(format=stream.pix_fmt)
            frame.pts = n
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    info = probe(tmp_path / name)
    assert info.frames_at(25) == 40
    start = 20 / 25 if late else 0
    window = read_window(tmp_path / name, start, 17, 25, 96, 128)
    assert line_difference(window).max() < 4
    # The bar is where it was at one of the two moments of each frame.
    for n, frame in enumerate(window.float().mean(1)):
        bright = (frame.mean(0) - 40).clip(0)
        place = float(bright @ torch.arange(128.0) / bright.sum())
        first = (8 + 12 * (n + round(start * 25))) % 112 + 5.5
        assert min(abs((place - first - moved + 56) % 112 - 56) for moved in (0, 6)) < 2


def test_frames_that_only_some_flags_call_interlaced_are_read(tmp_path):
    """Interlacing that begins within a file costs no frame."""
    frames = counter_frames(40)
    path = encode_video(tmp_path / "a.mp4", frames, options={"flags": "+ilme+ildct", "x264-params": "tff=1"})
    assert read_counter(read_window(path, 0, 40, 16, 48, 64)) == [n % 27 for n in range(40)]
    assert read_counter(read_window(path, 31 / 16, 9, 16, 48, 64)) == [n % 27 for n in range(31, 40)]


def without_rate(path):
    """Replace the rate in the header of a WebM or MKV by an empty element, as if it had never been there."""
    data = path.read_bytes()
    at = data.index(b"\x23\xe3\x83")  # DefaultDuration
    size = data[at + 3] & 0x7F
    path.write_bytes(data[:at] + b"\xec" + bytes([0x80 | size + 2]) + bytes(size + 2) + data[at + 4 + size :])
    return path


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx"), ("a.webm", "libvpx-vp9"), ("a.mkv", "libx264")])
def test_a_missing_rate_is_measured(tmp_path, name, codec):
    jitter = [0, 16, -11, 9, -22, 19, -15, 23]
    times = [max(0, n / 16 + jitter[n % 8] / 1000 * (n > 0)) for n in range(40)]
    path = without_rate(encode_video(tmp_path / name, counter_frames(40), codec=codec, times=times))
    info = probe(path)
    assert info.rate == pytest.approx(16, rel=0.005)
    assert (info.native_frames, info.frames_at(16)) == (40, 40)
    assert read_counter(read_window(path, 15 / 16, 25, 16, 48, 64)) == [n % 27 for n in range(15, 40)]


@pytest.mark.parametrize("name", ["a.ts", "a.m2ts", "a.avi", "a.flv", "a.mov"])
def test_the_last_frame_counts_in_every_container(tmp_path, name):
    frames = counter_frames(81)
    with av.open(str(tmp_path / name), "w", format="mpegts" if name == "a.m2ts" else None) as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "3"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, "rgb24")))
        container.mux(stream.encode())
    assert probe(tmp_path / name).frames_at(25) == 81
    assert read_counter(read_window(tmp_path / name, 0, 81, 25, 48, 64)) == [n % 27 for n in range(81)]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".gif"])
@pytest.mark.parametrize(("count", "fps", "frozen"), [(1, 1, True), (3, "1/5", True), (30, 3, True), (30, 4, False)])
def test_a_slow_video_is_dropped_as_frozen(tmp_path, suffix, count, fps, frozen):
    (tmp_path / "data").mkdir()
    frames = counter_frames(count)
    if suffix == ".gif":
        stills = [Image.fromarray(frame) for frame in frames]
        milliseconds = int(1000 / Fraction(fps))
        if count == 1:
            return  # an image
        stills[0].save(tmp_path / f"data/a{suffix}", save_all=True, append_images=stills[1:], duration=milliseconds)
    else:
        encode_video(tmp_path / f"data/a{suffix}", frames, Fraction(fps))
    encode_video(tmp_path / "data/b.mp4", counter_frames(20))
    (tmp_path / "data/metadata.csv").write_text(f"file_name,text\na{suffix},a\nb.mp4,a\n")
    dropped = read_manifest(tmp_path / "data", "real", clip_settings(fps=16)).dropped
    assert [row.reason for row in dropped] == [DropReason.FROZEN] * frozen


def test_only_the_frozen_windows_of_a_video_are_refused(tmp_path):
    times = [*(n / 16 for n in range(20)), *(20 / 16 + n for n in range(1, 4)), *(5 + n / 16 for n in range(40))]
    path = encode_video(tmp_path / "a.mp4", counter_frames(len(times)), times=times)
    read_window(path, 0, 17, 16, 48, 64)
    read_window(path, 5, 17, 16, 48, 64)
    with pytest.raises(UnusableVideo, match="frozen") as error:
        read_window(path, 2, 17, 16, 48, 64)
    assert (error.value.reason, error.value.of_window) == (DropReason.FROZEN, True)


def texture(count, height=192, width=320):
    """Return frames (F, H, W, 3) of a camera that pans over coloured blocks."""
    rng = np.random.default_rng(0)
    scene = rng.integers(0, 256, (height // 4, (width + 3 * count) // 4 + 1, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([scene[:, 3 * n : 3 * n + width] for n in range(count)])


LOSSY = {
    "h264.ts": ("libx264", {}),
    "no_b.ts": ("libx264", {"bf": "0"}),
    "h264.mkv": ("libx264", {}),
    "open.mkv": ("libx264", {"x264-params": "open-gop=1:bframes=4:keyint=24:min-keyint=24"}),
    "hevc.ts": ("libx265", QUIET),
    "hevc.mkv": ("libx265", QUIET),
    "vp9.webm": ("libvpx-vp9", {"cpu-used": "8", "deadline": "realtime"}),
    "mpeg2.ts": ("mpeg2video", {"b": "2M"}),
    "mpeg4.ts": ("mpeg4", {"b": "4M"}),
}


def windows(path):
    """Return windows of 9 frames each: arrays, or the reason why one is refused."""
    found = []
    for start in range(0, 64, 9):
        try:
            found.append(read_window(path, start / 16, 9, 16, 48, 80).numpy().astype(int))
        except UnusableVideo as error:
            found.append(error.reason if error.of_window else None)
    return found


def assert_only_damage_is_refused(whole, damaged, most):
    refused = [isinstance(window, DropReason) for window in damaged]
    for good, window in zip(whole, damaged):
        assert isinstance(window, DropReason) or np.abs(window - good).mean() < 2
    assert 1 <= sum(refused) <= most


@pytest.mark.parametrize("lost", [29, 33])  # in all of these, frames that others are predicted from
@pytest.mark.parametrize("name", LOSSY)
def test_a_lost_packet_costs_the_windows_up_to_the_next_key_frame(tmp_path, name, lost):
    codec, options = LOSSY[name]
    path = encode_video(tmp_path / name, texture(72), codec=codec, options=options, key_frame_interval=24)
    whole = windows(path)
    assert all(isinstance(window, np.ndarray) for window in whole)  # a good file is not hit
    with av.open(str(path)) as source, av.open(str(tmp_path / f"lost_{name}"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for n, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if n != lost:
                packet.stream = copy
                target.mux(packet)
    assert_only_damage_is_refused(whole, windows(tmp_path / f"lost_{name}"), most=3)


@pytest.mark.parametrize("name", ["h264.ts", "hevc.ts", "mpeg2.ts", "h264.mkv", "h264.mp4"])
def test_damaged_bytes_cost_the_windows_up_to_the_next_key_frame(tmp_path, name):
    codec, options = LOSSY.get(name, ("libx264", {}))
    path = encode_video(tmp_path / name, texture(72), codec=codec, options=options, key_frame_interval=24)
    whole, content = windows(path), path.read_bytes()
    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[0]) if packet.size]
    place = packets[26].pos + packets[26].size // 2
    if path.suffix == ".ts":  # a packet of the transport stream is lost
        place = place // 188 * 188
        path.write_bytes(content[:place] + content[place + 188 :])
    else:
        path.write_bytes(content[:place] + bytes(200) + content[place + 200 :])
    assert_only_damage_is_refused(whole, windows(path), most=5)


def test_a_capture_of_variable_rate_has_no_holes(tmp_path):
    gaps = np.random.default_rng(1).choice([1, 2, 3], 60, p=[0.6, 0.3, 0.1]) / 30
    path = encode_video(tmp_path / "a.mkv", counter_frames(61), fps=30, times=np.concatenate([[0], np.cumsum(gaps)]))
    for start in (0, 1, 2):
        read_window(path, start, 17, 16, 48, 64)


@pytest.mark.parametrize("name", ["h264.mkv", "no_b.mkv", "open.mkv", "hevc.mkv"])
def test_frames_left_out_of_a_still_scene_are_no_loss(tmp_path, name):
    codec, options = LOSSY.get(name, LOSSY["no_b.ts"])
    shown = [n for n in range(72) if n not in {30, 31, 32, 50}]
    path = encode_video(
        tmp_path / name,
        texture(72)[shown],
        codec=codec,
        options=options,
        times=[n / 16 for n in shown],
        key_frame_interval=24,
    )
    whole = encode_video(tmp_path / f"whole_{name}", texture(72), codec=codec, options=options, key_frame_interval=24)
    for window, expected in zip(windows(path)[:3], windows(whole)[:3], strict=True):
        assert np.abs(window - expected).mean() < 2
    still = read_window(path, 30 / 16, 1, 16, 48, 80)[0].int() - read_window(path, 29 / 16, 1, 16, 48, 80)[0].int()
    assert not still.any()
    read_window(path, 24 / 16, 17, 16, 48, 80)


@pytest.mark.parametrize("suffix", [".ts", ".m2ts"])
def test_a_decoder_that_starts_anywhere_is_given_a_key_frame(tmp_path, suffix):
    path = encode_video(
        tmp_path / f"a{suffix}", texture(72), codec="mpeg4", options={"b": "4M"}, key_frame_interval=24
    )
    expected = read_window(path, 0, 72, 16, 48, 80).int()
    for start in (20, 34, 47, 60):
        window = read_window(path, start / 16, 5, 16, 48, 80).int()
        assert (window - expected[start : start + 5]).abs().float().mean() < 1


def test_a_file_cut_before_its_first_key_frame_is_damaged_up_to_it(tmp_path):
    whole = encode_video(tmp_path / "a.ts", texture(72), codec="mpeg4", options={"b": "4M"}, key_frame_interval=24)
    with av.open(str(whole)) as source, av.open(str(tmp_path / "cut.ts"), "w") as target:
        stream = source.streams.video[0]
        copy = target.add_stream_from_template(stream)
        for n, packet in enumerate(packet for packet in source.demux(stream) if packet.size):
            if n >= 10:
                packet.stream = copy
                target.mux(packet)
    with pytest.raises(UnusableVideo, match="data is lost") as error:
        read_window(tmp_path / "cut.ts", 0, 9, 16, 48, 80)
    assert (error.value.reason, error.value.of_window) == (DropReason.DAMAGED, True)
    window, expected = read_window(tmp_path / "cut.ts", 1, 9, 16, 48, 80), read_window(whole, 26 / 16, 9, 16, 48, 80)
    assert (window.int() - expected.int()).abs().float().mean() < 1
