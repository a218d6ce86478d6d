"""From a folder of videos to a dataset."""

import csv
import json
import re
import shlex
import shutil
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from c2r import InputError, cli
from c2r.data.folders import read_frames
from c2r.data.manifest import read_manifest
from c2r.data.video import UnusableVideo, read_window
from c2r.options import ENCODE
from c2r.options.shared import clip_settings
from c2r.prepare import main
from tests.helpers.caption_model import WORDS, save_tiny_caption_model
from tests.helpers.scenes import read_scene, scene_frames
from tests.helpers.videos import encode_video


def metadata(folder):
    with open(folder / "metadata.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def detections(folder, skip=0):
    """Return the names of the videos whose cuts were searched, in order, without the first lines of the notes."""
    lines = (folder / ".c2r_cache/prepare/notes.jsonl").read_text().splitlines()[skip:]
    return [note["of"][1] for note in map(json.loads, lines) if note["of"][0] == "cuts"]


@pytest.fixture
def videos(tmp_path):
    """Write three videos of several scenes with their captions, one at a variable frame rate; return the folder."""
    folder = tmp_path / "videos"
    times = np.cumsum(np.random.default_rng(1).choice([17, 33, 50], 150)) / 1000
    encode_video(folder / "a.mp4", scene_frames(40, 60, 50), times=[float(time - times[0]) for time in times])
    encode_video(folder / "day/b.mkv", scene_frames(30, 4, 31), fps=24)
    encode_video(folder / "day/c.mp4", scene_frames(48, height=64, width=48), fps=30)
    (folder / "a.txt").write_bytes("Café".encode("cp1252"))
    (folder / "day/b.txt").write_bytes("Straße".encode("utf-16"))
    (folder / "day/c.txt").write_text("a street,\nat dusk")
    return folder


def test_a_folder_becomes_a_dataset_whose_clips_lie_within_scenes(videos, capsys):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in videos.rglob("*.*")}
    main([str(videos)])
    printed = capsys.readouterr().out
    rows = metadata(videos)
    assert [(row["file_name"], row["text"]) for row in rows] == [
        *[("a.mp4", "Café")] * 3,
        *[("day/b.mkv", "Straße")] * 3,
        ("day/c.mp4", "a street, at dusk"),
    ]
    assert rows[4]["start"] == "1.25"
    assert "found 3 videos and 0 image sequences" in printed
    assert "a.txt: is not UTF-8, read as Windows-1252" in printed
    assert "3 videos, 7 scenes" in printed
    assert "kept 6 clips of 3 files" in printed
    assert "captions: 7 from text files" in printed
    assert "size 48x64: 2 videos, crops away 0.0%" in printed

    # The command that is proposed reads the dataset, and none of its clips has a cut.
    line = next(line for line in printed.splitlines() if "c2r.encode" in line)
    settings = clip_settings(cli.parse(ENCODE, shlex.split(line)[3:]))
    manifest = read_manifest(videos, "real", settings)
    assert len(manifest.clips) >= 6
    assert {row.reason for row in manifest.dropped} == {"too short"}  # four frames
    for clip in manifest.clips:
        assert len(set(read_scene(read_frames(clip.target_file, clip, settings)))) == 1
    assert {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in before} == before
    sheets = {path.name for path in (videos / ".c2r_cache/prepare").glob("*.png")}
    assert sheets == {f"clips-{clip.bucket}.png" for clip in manifest.clips}


def test_a_second_run_searches_new_videos_only(videos):
    main([str(videos)])
    first = metadata(videos)
    assert detections(videos) == ["a.mp4", "day/b.mkv", "day/c.mp4"]
    main([str(videos)])
    assert metadata(videos) == first
    assert len(detections(videos)) == 3
    # As if a kill had cut the notes short: the last video is searched again.
    notes = videos / ".c2r_cache/prepare/notes.jsonl"
    notes.write_text(notes.read_text()[:-9])
    shutil.copy(videos / "a.mp4", videos / "new.mp4")
    (videos / "new.txt").write_text("new")
    main([str(videos)])
    lines = notes.read_text().splitlines()
    assert [json.loads(line)["of"][1] for line in (*lines[:2], *lines[3:])] == [
        *("a.mp4", "day/b.mkv", "day/c.mp4", "new.mp4"),
    ]
    assert [row["start"] for row in metadata(videos) if row["file_name"] == "new.mp4"] == [
        row["start"] for row in first if row["file_name"] == "a.mp4"
    ]


@pytest.mark.parametrize("value", ["soon", [["1", "2"]], [[0.5]], [[0.5, float("nan")]], {}])
def test_notes_of_another_type_are_ignored(value, videos, capsys):
    main([str(videos)])
    rows, notes = metadata(videos), videos / ".c2r_cache/prepare/notes.jsonl"
    lines = notes.read_text().splitlines()
    broken = json.dumps({**json.loads(lines[0]), "value": value})
    notes.write_text("\n".join([broken, "[]", '{"key": []}', *lines[1:]]))
    capsys.readouterr()
    main([str(videos)])
    printed = capsys.readouterr().out
    assert printed.count("ignored, and found again") == 3
    assert f"warning: {notes}: line 2: " in printed
    assert metadata(videos) == rows
    assert detections(videos, skip=3) == ["day/b.mkv", "day/c.mp4", "a.mp4"]


def test_without_scenes_each_video_is_a_row(videos):
    main([str(videos), "--no-scenes"])
    assert [list(row) for row in metadata(videos)] == [["file_name", "text"]] * 3
    assert not (videos / ".c2r_cache/prepare/notes.jsonl").exists()


@pytest.mark.parametrize("names", [("{}_fine.mp4", "{}_coarse.mp4"), ("fine/{}.mp4", "coarse/{}.mov")])
def test_pairs_are_cut_together(names, tmp_path, capsys):
    for shot in ("x", "y"):
        for name, height in zip(names, (96, 48)):
            encode_video(tmp_path / name.format(shot), scene_frames(20, 28, height=height, width=height * 4 // 3))
    encode_video(tmp_path / names[0].format("alone"), scene_frames(20))
    (tmp_path / names[1].format("y")).with_suffix(".txt").write_text("of the coarse video")
    main([str(tmp_path), "--domain=cg", "--default_caption=a street"])
    printed = capsys.readouterr().out
    alone = names[0].format("alone")
    assert f"warning: {alone}: without a partner" in printed
    assert "2 videos (2 of them with their coarse version), 4 scenes" in printed
    assert "captions: 2 from --default_caption, 2 from text files" in printed
    rows = metadata(tmp_path)
    fine, coarse = (name.format("x") for name in names)
    assert [tuple(row.values()) for row in rows[:2]] == [
        (fine, coarse, "a street", "", "1.25"),
        (fine, coarse, "a street", "1.25", ""),
    ]
    assert {row["text"] for row in rows[2:]} == {"of the coarse video"}
    settings = clip_settings(cli.parse(ENCODE, ["--dataset=x", "--buckets", "17x48x64"]))
    clips = read_manifest(tmp_path, "cg", settings).clips
    assert sorted((clip.name, clip.start) for clip in clips) == [
        *((names[0].format(shot), start) for shot in "xy" for start in (0.0, 1.25))
    ]
    for clip in clips:
        scenes = [read_scene(read_frames(file, clip, settings)) for file in (clip.target_file, clip.coarse_file)]
        assert scenes[0] == scenes[1] == [int(clip.start > 0)] * 17


def test_captions_get_a_prefix_once_and_unnamed_looks_are_counted(tmp_path, capsys):
    texts = {"a": "CG  render of a street", "b": "a street", "c": "cg render often"}
    for name, text in texts.items():
        for look in ("fine", "coarse"):
            encode_video(tmp_path / f"{name}_{look}.mp4", scene_frames(12), fps=8)
        (tmp_path / f"{name}_fine.txt").write_text(text)
    main([str(tmp_path), "--domain=cg"])
    assert "1 of 3 captions do not name the CG look; with --caption_prefix" in capsys.readouterr().out
    for _ in range(2):  # the second time all captions have it already
        main([str(tmp_path), "--domain=cg", "--caption_prefix= cg render  of"])
        assert [row["text"] for row in metadata(tmp_path)] == [
            "CG render of a street",
            "cg render of a street",
            "cg render of cg render often",
        ]
        assert "do not name" not in capsys.readouterr().out
        (tmp_path / "b_fine.txt").write_text("cg render of a street")
    main([str(tmp_path), "--domain=cg", "--caption_prefix=game engine footage of"])
    assert "do not name" not in capsys.readouterr().out  # in the user's own words
    main([str(tmp_path), "--default_caption=a street"])
    assert "do not name" not in capsys.readouterr().out  # real clips have no such look


def test_pairs_in_containers_of_other_clocks_are_cut_at_one_frame(tmp_path):
    frames = scene_frames(30, 31, 35, 40)
    for name in ("s_fine.mp4", "s_coarse.mkv"):  # Matroska rounds 24 frames per second to milliseconds
        encode_video(tmp_path / name, frames, fps=24)
    main([str(tmp_path), "--domain=cg", "--default_caption=a street"])
    settings = clip_settings(cli.parse(ENCODE, ["--dataset=x", "--buckets", "17x48x64", "5x48x64"]))
    clips = read_manifest(tmp_path, "cg", settings).clips
    assert len(clips) > 4
    for clip in clips:
        scenes = [read_scene(read_frames(file, clip, settings)) for file in (clip.target_file, clip.coarse_file)]
        assert len({*scenes[0], *scenes[1]}) == 1


def test_image_sequences_need_a_rate(tmp_path, capsys):
    for side in ("coarse", "fine"):
        (tmp_path / f"shot_{side}").mkdir()
        for n, frame in enumerate(scene_frames(48), 1001):
            Image.fromarray(frame).save(tmp_path / f"shot_{side}/{n}.png")
    (tmp_path / "shot_fine.txt").write_text("a street")
    Image.fromarray(frame).save(tmp_path / "look_1.png")
    with pytest.raises(InputError, match=r"^--sequence_fps: missing, and .* \(shot_coarse, shot_fine\); give their"):
        main([str(tmp_path), "--domain=cg"])
    main([str(tmp_path), "--domain=cg", "--sequence_fps=24"])
    printed = capsys.readouterr().out
    assert "found 0 videos and 2 image sequences" in printed
    assert "1 pictures belong to no sequence" in printed
    assert [tuple(row.values()) for row in metadata(tmp_path)] == [("shot_fine", "shot_coarse", "a street", "24")]
    assert "kept 1 clips of 1 files" in printed  # 32 frames at 16 fps


def test_a_table_gives_captions_parts_and_controls(videos):
    table = "Video;Prompt;Coarse;Start;End\na.mp4;Straße;day/b.mkv;;1\na.mp4;Café;day/b.mkv;1;2.5\nc;rain;;;\n"
    (videos / "my table.csv").write_bytes(table.encode("cp1252"))
    main([str(videos)])
    assert [tuple(row.values()) for row in metadata(videos)] == [
        ("a.mp4", "day/b.mkv", "Straße", "", "1"),
        ("a.mp4", "day/b.mkv", "Café", "1", "2.5"),
        ("day/c.mp4", "", "rain", "", ""),
    ]
    assert detections(videos) == ["day/c.mp4"]


def test_videos_without_a_caption_are_named_and_nothing_is_written(videos, capsys):
    (videos / "day/b.txt").unlink()
    (videos / "day/c.txt").write_text(" \n")
    with pytest.raises(InputError, match="2 of 3 videos have no caption, nothing was written; put a"):
        main([str(videos)])
    printed = capsys.readouterr().out
    assert "day/b.mkv: without a caption" in printed
    assert "day/c.mp4: without a caption" in printed
    assert not (videos / "metadata.csv").exists()


def test_a_model_captions_each_scene_once(videos, tmp_path, capsys):
    (videos / "day/b.txt").unlink()
    model = save_tiny_caption_model(tmp_path / "model")
    command = [str(videos), f"--caption_model={model}", "--caption_prompt=word1 word2"]
    main(command)
    rows = metadata(videos)
    assert [row["text"] for row in rows[:3]] == ["Café"] * 3
    answers = [row["text"] for row in rows[3:6]]
    assert all(answer and set(answer.split()) <= {*WORDS, "<unk>"} for answer in answers)
    assert len(set(answers)) > 1  # the scenes look different
    assert "captions: 4 from text files, 3 from caption model" in capsys.readouterr().out
    shutil.rmtree(model)
    main(command)
    assert metadata(videos) == rows


def test_an_unfit_caption_model_is_answered_in_one_line(videos, tmp_path, tiny_models):
    (videos / "a.txt").unlink()
    silent = save_tiny_caption_model(tmp_path / "silent", chat_template=None)
    for model, reason in (
        (tiny_models / "dinov3", "cannot be loaded as an image-text-to-text model"),
        (silent, "has no chat template"),
    ):
        with pytest.raises(InputError, match=f"^--caption_model {re.escape(str(model))}: {reason}") as error:
            main([str(videos), f"--caption_model={model}"])
        assert "\n" not in str(error.value)


def test_a_metadata_file_of_other_origin_is_kept(videos):
    (videos / "metadata.csv").write_bytes("file_name;text\na.mp4;Straße\n".encode("cp1252"))
    with pytest.raises(InputError, match=r"metadata\.csv: was not written by this command, or was changed since"):
        main([str(videos), "--no-scenes"])
    main([str(videos), "--no-scenes", "--overwrite"])
    first = metadata(videos)
    assert [row["text"] for row in first] == ["Straße", "Straße", "a street, at dusk"]
    assert (videos / "replaced_metadata.csv").read_bytes() == "file_name;text\na.mp4;Straße\n".encode("cp1252")
    main([str(videos), "--no-scenes"])
    assert metadata(videos) == first
    with open(videos / "metadata.csv", "a") as file:
        file.write("a.mp4,by hand\n")
    with pytest.raises(InputError, match="was changed since"):
        main([str(videos), "--no-scenes"])


def test_files_that_cannot_be_used_are_named(videos, tmp_path, capsys):
    (videos / "broken.mp4").write_bytes(b"no video")
    (videos / "gap").mkdir()
    for n in (1, 2, 3, 5, 6):
        Image.new("RGB", (16, 16)).save(videos / f"gap/{n}.png")
    outside = encode_video(tmp_path / "outside.mp4", scene_frames(20))
    (videos / "link.mp4").symlink_to(outside)
    encode_video(videos / ".hidden/h.mp4", scene_frames(20))
    (videos / "._a.mp4").write_bytes(b"left by macOS")
    main([str(videos), "--no-scenes", "--sequence_fps=8"])
    printed = capsys.readouterr().out
    assert {row["file_name"] for row in metadata(videos)} == {"a.mp4", "day/b.mkv", "day/c.mp4"}
    assert "found 5 videos and 1 image sequences" in printed
    assert re.search(r"warning: not used, unreadable: .*broken\.mp4: cannot be decoded", printed)
    assert re.search(r"warning: not used, missing frames: .*gap: of the pictures 1 to 6, 1 are missing: 4", printed)
    assert "warning: not used, path outside the folder: link.mp4 leads to" in printed
    assert "hidden" not in printed
    assert "._a" not in printed


@pytest.fixture
def damaged_video(videos):
    """Return the dataset folder with a video of 60 frames, noise, a part of whose bytes is lost."""
    frames = np.random.default_rng(0).integers(0, 256, (60, 48, 64, 3), np.uint8)
    path = encode_video(videos / "z.mkv", frames)
    content = bytearray(path.read_bytes())
    damaged = range(len(content) * 5 // 10, len(content) * 6 // 10)
    content[damaged.start : damaged.stop] = bytes(len(damaged))
    path.write_bytes(content)
    (videos / "z.txt").write_text("damaged")
    return videos


def clips_of_damaged(folder, num_frames):
    settings = clip_settings(cli.parse(ENCODE, ["--dataset=x", "--buckets", f"{num_frames}x48x64"]))
    return [clip for clip in read_manifest(folder, "real", settings).clips if clip.name == "z.mkv"]


def test_a_damaged_spot_costs_the_clips_that_it_hits(damaged_video, capsys):
    for _ in range(2):
        main([str(damaged_video), "--overwrite"])
        assert re.search(r"warning: z\.mkv: data is lost from 1\.\d s on", capsys.readouterr().out)
    good = []
    for clip in clips_of_damaged(damaged_video, 9):
        with suppress(UnusableVideo):
            read_window(clip.target_file.path, float(clip.start), 9, 16, 48, 64)
            good.append(clip)
    assert 0 < len(good) < len(clips_of_damaged(damaged_video, 9))


def test_a_video_whose_only_clip_is_damaged_is_not_used(damaged_video, capsys):
    main([str(damaged_video), "--no-scenes"])
    assert re.search(r"warning: cannot be used, damaged: .*z\.mkv: is damaged", capsys.readouterr().out)
    assert not clips_of_damaged(damaged_video, 41)
    assert clips_of_damaged(damaged_video, 9)  # only the clip of the contact sheet was noted


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--dataset: missing; give a folder"),
        (["nowhere"], "--dataset nowhere: no such folder; check the path"),
        (["s3://bucket/a"], "--dataset s3://bucket/a: is not on this machine; download it"),
        (["{}", "--captions=nowhere.csv"], "--captions nowhere.csv: no such file; give a table of captions"),
        (["{}", "--domain=cg"], "{}: has no pairs; name them a_fine.mp4 and a_coarse.mp4, or"),
        (["{}", "--domain=cg", "--fine_pattern=*_f"], "--fine_pattern *_f: names one side of the pairs; give"),
        (["{}", "--fine_pattern=*_f", "--coarse_pattern=*_c"], "--fine_pattern *_f: names pairs; give --domain cg"),
        (
            ["{}", "--domain=cg", "--fine_pattern=f/*/*", "--coarse_pattern=*_c"],
            "--fine_pattern f/*/*: must have a * for each * of --coarse_pattern, at least one; add it",
        ),
        (["{}", "--default_caption= "], "--default_caption ' ': is empty; give a text"),
        (["{}", "--caption_prefix="], "--caption_prefix '': is empty; give a text"),
        (
            ["{}", "--default_caption=a", "--caption_model=b"],
            "--default_caption a: --caption_model captions all; leave one out",
        ),
        (["{}", "--output_dir={}/a.mp4"], "--output_dir {}/a.mp4: is a file; give a folder"),
    ],
)
def test_bad_input_is_answered_in_one_line(argv, message, videos):
    with pytest.raises(InputError, match=f"^{re.escape(message.format(videos))}") as error:
        main([argument.format(videos) for argument in argv])
    assert "\n" not in str(error.value)
    assert not (videos / "metadata.csv").exists()


def test_a_folder_of_broken_videos_names_them(tmp_path, capsys):
    (tmp_path / "a.mp4").write_bytes(b"no video")
    with pytest.raises(InputError, match="none of its videos can be used; see the reasons above"):
        main([str(tmp_path)])
    assert "a.mp4: cannot be decoded" in capsys.readouterr().out


def test_a_folder_without_videos_and_one_with_metadata_are_refused(tmp_path):
    with pytest.raises(InputError, match="holds no videos or image sequences; give the folder that holds them"):
        main([str(tmp_path)])
    (tmp_path / "metadata.jsonl").write_text("")
    with pytest.raises(InputError, match=r"metadata\.jsonl: is there already"):
        main([str(tmp_path)])
