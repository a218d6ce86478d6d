"""Turn a folder of videos into a dataset, without touching the videos.

    python -m c2r.prepare data/real
    python -m c2r.prepare data/cg --domain cg --sequence_fps 24

Finds videos and image sequences, captions, pairs and cuts, writes metadata.csv, proposes --buckets, and draws contact
sheets. Started again after an interruption it goes on where it was.

Modules that take seconds to import are imported inside functions: --help and bad options are then answered at once.
"""

import logging
import re
import shlex
from argparse import Namespace
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from c2r import InputError, cli
from c2r.options import PREPARE

if TYPE_CHECKING:
    from c2r.data.drop_reasons import DroppedRow
    from c2r.data.folders import LocalFolder
    from c2r.data.manifest import Manifest
    from c2r.preparation.captions import Captions
    from c2r.preparation.metadata_file import MetadataFile, Row
    from c2r.preparation.notes import Notes
    from c2r.preparation.sources import Source, Video

logger = logging.getLogger("c2r.prepare")  # under python -m, __name__ is "__main__"

#: Files that are named one by one for one reason.
MAX_NAMED = 20
#: Words that tell that a caption is of CG.
CG_WORDS = re.compile(r"\b(cgi?|3d|computer[ -]generated|render(s|ed|ing|ings)?)\b", re.IGNORECASE)


def main(argv: list[str] | None = None) -> None:
    """Run the command with these arguments."""
    args = cli.parse(PREPARE, cli.name_first_words("dataset", argv))
    check_options(args)

    from c2r.data.folders import LocalFolder
    from c2r.data.probes import Probes
    from c2r.files import refuse_linked_folders
    from c2r.preparation.metadata_file import MetadataFile
    from c2r.preparation.notes import Notes
    from c2r.preparation.scenes import require_detector
    from c2r.preparation.sources import list_sources, measure

    if args.scenes:
        require_detector()
    folder = LocalFolder(args.dataset)
    cache_dir = Path(folder.address, ".c2r_cache")
    refuse_linked_folders(cache_dir)
    notes = Notes(cache_dir / "prepare/notes.jsonl")
    metadata = MetadataFile(folder.address, notes.path.parent, args.overwrite)

    sources, pictures = list_sources(folder.address)
    if not sources:
        raise InputError(f"{args.dataset}: holds no videos or image sequences; give the folder that holds them")
    captions = read_captions(args, folder, sources, metadata)
    rates = dict.fromkeys((source.name for source in sources), args.sequence_fps) | captions.rates
    videos, unusable = measure(folder, sources, rates, Probes(cache_dir))
    report_files(sources, pictures, unusable, captions.remarks)

    rows = pair_videos(args, videos, captions) if args.domain == "cg" else single_videos(videos, captions)
    rows = add_captions(rows, captions)
    require_captions(args, rows)
    damaged: list[DroppedRow] = []
    if args.scenes:
        rows = split_at_cuts(rows, args.scene_threshold, notes, damaged)
    if args.caption_model is not None:
        rows = ask_caption_model(rows, args.caption_model, args.caption_prompt, notes, damaged)
    rows = [
        row if row.text else replace(row, text=args.default_caption, caption_source="--default_caption")
        for row in rows
    ]
    if args.caption_prefix is not None:
        rows = [replace(row, text=with_prefix(row.text, args.caption_prefix)) for row in rows]

    report_unusable(damaged)
    if not rows:
        raise InputError(f"{args.dataset}: none of its videos can be used; see the reasons above")
    report_rows(rows)
    if args.domain == "cg" and args.caption_prefix is None:
        report_unnamed_look([row.text for row in rows])
    metadata.write(rows)
    logger.info(f"wrote {metadata.path}")
    propose(args, folder, rows)


def check_options(args: Namespace) -> None:
    """Raise InputError for files and folders that are not there, or not on this machine."""
    if "://" in args.dataset:
        raise InputError(f"--dataset {args.dataset}: is not on this machine; download it and give its folder")
    if not Path(args.dataset).is_dir():
        raise InputError(f"--dataset {args.dataset}: no such folder; check the path")
    if args.captions is not None and not Path(args.captions).is_file():
        raise InputError(f"--captions {args.captions}: no such file; give a table of captions")
    if args.output_dir is not None and Path(args.output_dir).exists() and not Path(args.output_dir).is_dir():
        raise InputError(f"--output_dir {args.output_dir}: is a file; give a folder")


# ------------------------------------------------------------------------------------------------- captions and pairs


def read_captions(
    args: Namespace, folder: "LocalFolder", sources: "Sequence[Source]", metadata: "MetadataFile"
) -> "Captions":
    """Read the captions that people have written: a table and text files."""
    from c2r.preparation.captions import Captions, find_table, match_table, read_table, read_text_files

    captions = Captions()
    table = (
        Path(args.captions)
        if args.captions
        else find_table(folder.address, metadata.path if metadata.is_own else None, captions)
    )
    if table is not None:
        rows, remark = read_table(table, str(table))
        captions.remarks += [remark] if remark else []
        match_table(rows, table.name, sources, captions)
    read_text_files(folder.address, sources, captions)
    return captions


def single_videos(videos: "Mapping[str, Video]", captions: "Captions") -> "list[Row]":
    """Return a row for each video; a coarse version that a table names is the control of its video."""
    from c2r.preparation.metadata_file import Row

    controls = {name: rows[0].control_name for name, rows in captions.rows.items() if rows[0].control_name}
    return [
        Row(video, videos.get(controls.get(name, "")))
        for name, video in videos.items()
        if name not in controls.values()
    ]


def pair_videos(args: Namespace, videos: "Mapping[str, Video]", captions: "Captions") -> "list[Row]":
    """Return a row for each pair of a fine and a coarse video, as a table or their names tell.

    Raises:
        InputError: there is no pair.
    """
    from c2r.preparation.metadata_file import Row
    from c2r.preparation.pairs import PATTERNS, pair_sources

    controls = {name: rows[0].control_name for name, rows in captions.rows.items() if rows[0].control_name}
    pairs = {name: coarse for name, coarse in controls.items() if name in videos and coarse in videos}
    others = [video.source for name, video in videos.items() if name not in pairs and name not in pairs.values()]
    patterns = [(args.fine_pattern, args.coarse_pattern)] if args.fine_pattern else PATTERNS
    by_name, unpaired = pair_sources(others, patterns)
    pairs |= {fine.name: coarse.name for fine, coarse in by_name.items()}
    name_each("without a partner", [source.name for source in unpaired])
    if not pairs:
        raise InputError(
            f"{args.dataset}: has no pairs; name them a_fine.mp4 and a_coarse.mp4, or fine/a.mp4 and coarse/a.mp4, or "
            "give --fine_pattern and --coarse_pattern"
        )
    return [Row(videos[fine], videos[coarse]) for fine, coarse in sorted(pairs.items())]


def add_captions(rows: "list[Row]", captions: "Captions") -> "list[Row]":
    """Give rows the captions of a table, or else of the text file of the video or of its control."""
    captioned = []
    for row in rows:
        names = [row.video.name, *([row.control.name] if row.control else [])]
        found = next((captions.rows[name] for name in names if name in captions.rows), [])
        text = next((captions.texts[name] for name in names if name in captions.texts), "")
        source = "text files" if text else ""
        if not found:
            captioned.append(replace(row, text=text, caption_source=source))
        for entry in found:
            texts = (entry.text, "table") if entry.text else (text, source)
            captioned.append(replace(row, text=texts[0], caption_source=texts[1], start=entry.start, end=entry.end))
    return captioned


def require_captions(args: Namespace, rows: "list[Row]") -> None:
    """Raise InputError if a video has no caption and nothing is to give it one."""
    missing = [row.video.name for row in rows if not row.text]
    if missing and args.caption_model is None and args.default_caption is None:
        name_each("without a caption", missing)
        raise InputError(
            f"{args.dataset}: {len(missing)} of {len(rows)} videos have no caption, nothing was written; put a .txt "
            "of its name beside each, or give --captions, --caption_model or --default_caption"
        )


def with_prefix(caption: str, prefix: str) -> str:
    """Return a caption that begins with the prefix, once."""
    prefix = " ".join(prefix.split())
    begins_with_it = re.match(rf"{re.escape(prefix)}(?!\w)", caption, re.IGNORECASE)
    return caption if begins_with_it else f"{prefix} {caption}"


# ---------------------------------------------------------------------------------------------------------- slow steps


def split_at_cuts(rows: "list[Row]", threshold: float, notes: "Notes", damaged: "list[DroppedRow]") -> "list[Row]":
    """Return a row for each scene. Rows that already are a part of a file stay as they are.

    The cuts of a pair are those of its fine video. Videos that turn out to be damaged are added to `damaged`.
    """
    from pydantic import FiniteFloat
    from tqdm import tqdm

    from c2r.bars import bar_settings
    from c2r.data.drop_reasons import DroppedRow
    from c2r.data.video_info import UnusableVideo
    from c2r.preparation.scenes import find_cuts, parts_between

    split = []
    for row in tqdm(rows, desc="finding cuts", unit="video", **bar_settings(shown=True)):
        file = row.video.file
        if row.start or row.end:
            split.append(row)
            continue
        key = ("cuts", file.name, file.size, file.mtime_ns, threshold)
        cuts = notes.get(list[tuple[FiniteFloat, FiniteFloat]], *key)
        if cuts is None:
            lost: list[Fraction] = []
            try:
                cuts = find_cuts(file.path, threshold, lost)
            except UnusableVideo as error:
                damaged.append(DroppedRow(row.video.name, error.reason, str(error)))
                continue
            if lost:
                logger.warning(
                    f"{row.video.name}: data is lost from {float(lost[0]):.1f} s on, to {float(lost[-1]):.1f} s at "
                    "the latest; encoding drops the clips that it hits"
                )
            else:
                notes.add(cuts, *key)
        interval = max(video.info.interval for video in (row.video, row.control) if video)
        split += [replace(row, start=start, end=end) for start, end in parts_between(cuts, interval)]
    return split


def ask_caption_model(
    rows: "list[Row]", model_name: str, prompt: str, notes: "Notes", damaged: "list[DroppedRow]"
) -> "list[Row]":
    """Let a model write the captions that are missing, one for each scene.

    Raises:
        InputError: the model cannot be loaded, or answers nothing.
    """
    from tqdm import tqdm

    from c2r.bars import bar_settings
    from c2r.data.drop_reasons import DroppedRow
    from c2r.data.video_info import UnusableVideo
    from c2r.preparation.caption_model import CaptionModel, middle_frames

    model, captioned = None, []
    for row in tqdm(rows, desc="writing captions", unit="clip", **bar_settings(shown=True)):
        if row.text:
            captioned.append(row)
            continue
        file = row.video.file
        key = ("caption", file.name, file.size, file.mtime_ns, row.start, row.end, model_name, prompt)
        text = notes.get(str, *key)
        if text is None:
            model = model or CaptionModel(model_name, prompt)
            start, end = float(row.start or 0), float(row.end or row.video.info.duration)
            try:
                text = model.caption(middle_frames(file.path, row.video.info, start, end))
            except UnusableVideo as error:
                damaged.append(DroppedRow(row.video.name, error.reason, str(error)))
                continue
            if not text:
                raise InputError(
                    f"--caption_model {model_name}: answers nothing for {row.video.name}; change --caption_prompt, or "
                    "write this caption"
                )
            notes.add(text, *key)
        captioned.append(replace(row, text=text, caption_source="caption model"))
    return captioned


# ------------------------------------------------------------------------------------------------------------- summary


def report_files(
    sources: "Sequence[Source]", pictures: int, unusable: "Sequence[DroppedRow]", remarks: Sequence[str]
) -> None:
    """Log what was found and what cannot be used."""
    sequences = sum(source.is_sequence for source in sources)
    logger.info(f"found {len(sources) - sequences} videos and {sequences} image sequences")
    if pictures:
        logger.info(f"{pictures} pictures belong to no sequence of at least 5 numbered pictures; not used")
    for remark in remarks:
        logger.warning(remark)
    report_unusable(unusable)


def report_unusable(rows: "Sequence[DroppedRow]") -> None:
    """Log videos that cannot be used, with their reasons."""
    for row in rows:
        logger.warning(f"not used, {row.reason}: {row.detail or row.file}")


def report_unnamed_look(captions: Sequence[str]) -> None:
    """Log how many captions of CG pairs do not say that they show CG."""
    unnamed = sum(not CG_WORDS.search(caption) for caption in captions)
    if unnamed:
        logger.info(
            f'{unnamed} of {len(captions)} captions do not name the CG look; with --caption_prefix "cg render of" the '
            "model can keep it apart from real prompts (docs/control.md, Remedies)"
        )


def report_rows(rows: "Sequence[Row]") -> None:
    """Log the numbers of pairs, scenes and captions."""
    files = len({row.video.name for row in rows})
    pairs = len({row.video.name for row in rows if row.control})
    sources = Counter(row.caption_source for row in rows).most_common()
    logger.info(
        f"{files} videos{f' ({pairs} of them with their coarse version)' if pairs else ''}, {len(rows)} scenes"
    )
    logger.info("captions: " + ", ".join(f"{count} from {source}" for source, count in sources))


def name_each(what: str, names: Sequence[str]) -> None:
    """Log a line for each of some files, up to MAX_NAMED."""
    for name in names[:MAX_NAMED]:
        logger.warning(f"{name}: {what}")
    if len(names) > MAX_NAMED:
        logger.warning(f"{len(names) - MAX_NAMED} more files: {what}")


def propose(args: Namespace, folder: "LocalFolder", rows: "Sequence[Row]") -> None:
    """Log buckets, what they crop away and which clips they give; draw contact sheets; log the next commands."""
    from c2r.data.failures import note_failure
    from c2r.data.manifest import read_manifest
    from c2r.data.settings import ClipSettings
    from c2r.preparation.contact_sheets import write_contact_sheets
    from c2r.preparation.proposal import crops, propose_buckets

    def frames_of(row):
        end = min(float(row.end or "inf"), row.video.info.duration)
        return int((end - float(row.start or 0)) * args.fps)

    buckets = propose_buckets([(row.video.info, frames_of(row)) for row in rows])
    videos = {row.video.name: row.video.info for row in rows}
    for (height, width), crop in crops(list(videos.values()), buckets).items():
        logger.info(
            f"size {height}x{width}: {crop.videos} videos, crops away {crop.mean:.1%} of the picture in the mean and "
            f"{crop.worst:.1%} at worst"
        )
    settings = ClipSettings(buckets=tuple(buckets), fps=args.fps, base_model="")
    manifest = read_manifest(folder.address, args.domain, settings)
    manifest.report()
    sheets = Path(args.output_dir) if args.output_dir else Path(folder.address, ".c2r_cache/prepare")
    paths, failures = write_contact_sheets(manifest.clips, args.fps, sheets)
    for failure in failures:
        note_failure(manifest.cache_dir, failure)  # the next command drops it
        logger.warning(f"cannot be used, {failure.reason}: {failure.detail}")
    for path in paths:
        logger.info(f"contact sheet: {path}")
    for line in next_commands(args, manifest):
        logger.info(line)


def next_commands(args: Namespace, manifest: "Manifest") -> list[str]:
    """Return the commands to go on with."""
    buckets = " ".join(map(str, manifest.clips.buckets))
    clips = f"--buckets {buckets}" + ("" if args.fps == 16 else f" --fps {args.fps:g}")
    dataset = shlex.quote(args.dataset)
    encode = f"python -m c2r.encode --dataset {dataset} --domain {args.domain} {clips} --dry_run"
    if args.domain == "real":
        train = f"accelerate launch train_phase1.py --real_dataset {dataset} --output_dir outputs/phase1 {clips}"
    else:
        train = (
            f"accelerate launch train_phase2.py --cg_dataset {dataset} --real_dataset data/real "
            f"--resume_backbone_from outputs/phase1/best --output_dir outputs/phase2 {clips}"
        )
    return ["look at the contact sheets, then:", f"  {encode}", f"  {train} --dry_run"]


if __name__ == "__main__":
    cli.run(main)
