"""The metadata of a dataset, read by the `datasets` library, which keeps large tables on disk."""

import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
from datasets import Dataset

from c2r import InputError
from c2r.data.drop_reasons import DropRow
from c2r.data.folders import DatasetFolder
from c2r.data.table_checks import check_csv, check_jsonl, check_parquet
from c2r.files import UNWRITABLE, digest

COLUMNS = ("file_name", "text", "control_name", "start", "end", "fps", "id_name", "depth_name")

READERS = {
    # Captions such as "NA" and "007" stay text.
    "metadata.csv": lambda path, **kwargs: Dataset.from_csv(
        path,
        na_filter=False,
        converters=dict.fromkeys(COLUMNS, str),
        **kwargs,
    ),
    "metadata.jsonl": Dataset.from_json,
    "metadata.parquet": Dataset.from_parquet,
}
CHECKS = {"metadata.csv": check_csv, "metadata.jsonl": check_jsonl, "metadata.parquet": check_parquet}
ROWS_AT_ONCE = 10_000


def find_metadata(folder: DatasetFolder, domain: str, cache_dir: str | Path) -> list[tuple[str, Dataset]]:
    """Read the metadata tables of a dataset.

    Args:
        folder: has metadata.csv, .jsonl or .parquet in itself or in train/, and perhaps in validation/.
        domain: "real" or "cg"; CG pairs must have a control_name.
        cache_dir: the tables are kept there in arrow's format, which is read from disk as needed.

    Returns:
        [(name of the table's own folder within the dataset, table)], the main table first.

    Raises:
        InputError: no metadata, a column is missing, or a file cannot be read.
    """
    main = _find(folder, "") or _find(folder, "train")
    if main is None:
        raise InputError(
            f"{folder.address}: has no metadata.csv, .jsonl or .parquet, nor has its train/; add one of them"
        )
    tables = []
    for name in filter(None, (main, _find(folder, "validation"))):
        table = _read(folder, name, cache_dir)
        for column in COLUMNS[:3] if domain == "cg" else COLUMNS[:2]:
            if column not in table.column_names:
                raise InputError(
                    f"{folder.address}/{name}: has no column {column} (its columns: "
                    f"{', '.join(table.column_names)}); "
                    + ("CG pairs need the coarse video's name there" if column == "control_name" else "add it")
                )
        own_folder = name.rpartition("/")[0]
        tables.append((own_folder, table.select_columns([c for c in COLUMNS if c in table.column_names])))
    return tables


class Row(NamedTuple):
    """A row of the metadata; "" for a missing value."""

    file_name: str
    text: str
    control_name: str
    start: str
    end: str
    fps: str
    id_name: str
    depth_name: str


def rows_of(table: Dataset, address: str) -> Iterator[Row]:
    """Yield the rows of a table.

    Args:
        table: one of the tables of `find_metadata`.
        address: address of the table's folder, for messages.

    Raises:
        InputError: it holds text that is not UTF-8, which the readers of some formats accept.
    """
    for batch in table.with_format("arrow").iter(ROWS_AT_ONCE):
        try:
            columns = [batch[name].to_pylist() if name in batch.column_names else None for name in COLUMNS]
        except UnicodeDecodeError as error:
            raise InputError(f"{address}: its metadata is not UTF-8 ({error.reason}); correct the file") from error
        for values in zip(*(column or [None] * batch.num_rows for column in columns)):
            texts = Row(*map(_as_text, values))
            # Parquet and JSON have NaN for a number that is missing.
            yield texts._replace(**{name: "" for name in ("start", "end", "fps") if getattr(texts, name) == "nan"})


def _as_text(value: object) -> str:
    return "" if value is None else str(value)


def _find(folder: DatasetFolder, subfolder: str) -> str | None:
    """Return the name of the metadata file in the dataset's folder ("") or in a subfolder; None if there is none."""
    names = [f"{subfolder}/{name}".lstrip("/") for name in READERS]
    found = [name for name in names if folder.has_file(name)]
    if len(found) > 1:
        raise InputError(f"{folder.address}: has {' and '.join(found)}; keep one of them")
    return found[0] if found else None


def _read(folder: DatasetFolder, name: str, cache_dir: str | Path) -> Dataset:
    try:
        file = folder.locate(name)
    except DropRow as drop:
        raise InputError(f"{folder.address}/{name}: {drop.reason} ({drop.detail}); copy it into the folder") from None
    # Each state of the file has its own folder: `datasets` could mistake an old copy for the edited file.
    arrow_dir = Path(cache_dir) / "metadata" / digest([folder.address, name])[:16] / digest([*file])[:16]
    for old in arrow_dir.parent.glob("*"):
        if old != arrow_dir:
            shutil.rmtree(old, ignore_errors=True)
    bars_were_disabled, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # the exception carries the same text
    try:
        arrow_dir.parent.mkdir(parents=True, exist_ok=True)
        with folder.local_copy(file) as path:
            kind = PurePosixPath(name).name
            options = CHECKS[kind](path, f"{folder.address}/{name}") or {}
            return READERS[kind](str(path), cache_dir=str(arrow_dir), keep_in_memory=False, **options)
    except InputError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets raise many types
        shutil.rmtree(arrow_dir, ignore_errors=True)
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and (cause.errno in UNWRITABLE or not arrow_dir.parent.is_dir()):
            raise InputError(
                f"{cache_dir}: cannot be written ({cause.strerror}); make room, or give a writable --cache_dir"
            ) from error
        if "corresponds to no data" in str(error):
            raise InputError(f"{folder.address}/{name}: has no rows; list the videos in it") from error
        reason = " ".join(str(cause).split())
        raise InputError(f"{folder.address}/{name}: cannot be read ({reason}); correct the file") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars_were_disabled:
            datasets.enable_progress_bars()
