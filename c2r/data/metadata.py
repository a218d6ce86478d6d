"""The metadata of a dataset, read through `datasets`, which maps it from disk."""

import csv
import shutil
from pathlib import Path, PurePosixPath

import datasets
from datasets import Dataset

from c2r import InputError
from c2r.files import UNWRITABLE, digest

READERS = {
    # Captions are text, also "NA" and "007"; utf-8-sig because spreadsheet programs write a byte order mark.
    "metadata.csv": lambda path, **kwargs: Dataset.from_csv(
        path,
        encoding="utf-8-sig",
        na_filter=False,
        converters=dict.fromkeys(("file_name", "text", "control_name"), str),
        **kwargs,
    ),
    "metadata.jsonl": Dataset.from_json,
    "metadata.parquet": Dataset.from_parquet,
}
COLUMNS = ("file_name", "text", "control_name")
ROWS_AT_ONCE = 10_000


def find_metadata(folder, domain, cache_dir) -> list[tuple[str, Dataset]]:
    """The metadata tables of a dataset: [(folder that names are relative to, table)], the main one first.

    Args:
        folder: `LocalFolder` or `RemoteDataset`; has metadata.csv, .jsonl or .parquet in itself or in train/, and
            perhaps in validation/.
        domain: CG pairs must have a control_name.
        cache_dir: where the tables are kept in arrow's format, which is read from disk as needed.

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
        for column in COLUMNS if domain == "cg" else COLUMNS[:2]:
            if column not in table.column_names:
                raise InputError(
                    f"{folder.address}/{name}: has no column {column} (its columns: "
                    f"{', '.join(table.column_names)}); "
                    + ("CG pairs need the coarse video's name there" if column == "control_name" else "add it")
                )
        place = name.rpartition("/")[0]
        tables.append((place, table.select_columns([c for c in COLUMNS if c in table.column_names])))
    return tables


def rows_of(table, where):
    """All rows of a table as (file_name, text, control_name), each text; "" for nothing.

    Args:
        table: of `find_metadata`.
        where: it is, for messages.

    Raises:
        InputError: it holds text that is not UTF-8, which not every reader minds.
    """
    for batch in table.with_format("arrow").iter(ROWS_AT_ONCE):
        try:
            columns = [batch[name].to_pylist() if name in batch.column_names else None for name in COLUMNS]
        except UnicodeDecodeError as error:
            raise InputError(f"{where}: its metadata is not UTF-8 ({error.reason}); correct the file") from error
        columns = [[""] * batch.num_rows if column is None else column for column in columns]
        for row in zip(*columns):
            yield tuple("" if value is None else value if isinstance(value, str) else str(value) for value in row)


def _find(folder, place):
    """Name of the metadata in this part of a dataset, or None."""
    names = [f"{place}/{name}".lstrip("/") for name in READERS]
    found = [name for name in names if folder.has(name)]
    if len(found) > 1:
        raise InputError(f"{folder.address}: has {' and '.join(found)}; keep one of them")
    return found[0] if found else None


def _read(folder, name, cache_dir) -> Dataset:
    source = folder.locate(name)
    # A name of its own for each state of the file: `datasets` could take an old copy for the edited file.
    kept = Path(cache_dir) / "metadata" / digest([folder.address, name])[:16] / digest([*source])[:16]
    for old in kept.parent.glob("*"):
        if old != kept:
            shutil.rmtree(old, ignore_errors=True)
    bars, verbosity = datasets.are_progress_bars_disabled(), datasets.logging.get_verbosity()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the exception
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        with folder.local_copy(source) as path:
            if name.endswith(".csv"):
                _require_quoted(path, f"{folder.address}/{name}")
            return READERS[PurePosixPath(name).name](str(path), cache_dir=str(kept), keep_in_memory=False)
    except InputError:
        raise
    except Exception as error:  # pandas, pyarrow and datasets each have their own
        shutil.rmtree(kept, ignore_errors=True)
        cause = error.__cause__ or error
        if isinstance(cause, OSError) and (cause.errno in UNWRITABLE or not kept.parent.is_dir()):
            raise InputError(
                f"{cache_dir}: cannot be written ({cause.strerror}); make room, or give a --cache_dir that can be"
            ) from error
        if "corresponds to no data" in str(error):
            raise InputError(f"{folder.address}/{name}: has no rows; list the videos in it") from error
        reason = " ".join(str(cause).split())
        raise InputError(f"{folder.address}/{name}: cannot be read ({reason}); correct the file") from error
    finally:
        datasets.logging.set_verbosity(verbosity)
        if not bars:
            datasets.enable_progress_bars()


def _require_quoted(path, where):
    """Raise InputError if the first row has more fields than the header: pandas would take its first one for the row's
    name, and the caption for the file's."""
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:
        rows = csv.reader(file)
        header, row = next(rows, []), next(rows, [])
    if len(row) > len(header) > 0:
        raise InputError(
            f"{where}: its first row has {len(row)} fields, its header {len(header)}; put captions with a comma in "
            "double quotes"
        )
