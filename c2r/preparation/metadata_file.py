"""The metadata.csv that the command writes, and never over one that someone else wrote unless asked."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from c2r import InputError
from c2r.files import write_atomic
from c2r.preparation.sources import Video

#: Metadata files beside which a dataset must have no metadata.csv.
OTHERS = ("metadata.jsonl", "metadata.parquet")


@dataclass(frozen=True)
class Row:
    """A row of the metadata."""

    video: Video
    control: Video | None = None
    text: str = ""
    caption_source: str = ""  #: for the summary
    start: str = ""
    end: str = ""


class MetadataFile:
    """The metadata.csv of a folder.

    Args:
        folder: the dataset's.
        notes_folder: keeps the digest of the file as the command wrote it.
        overwrite: replace one of other origin, which is then kept as replaced_metadata.csv.

    Raises:
        InputError: there is one of other origin, and it is not to be replaced.
    """

    def __init__(self, folder: str, notes_folder: Path, overwrite: bool):
        self.path, self._mark = Path(folder, "metadata.csv"), notes_folder / "written.sha256"
        self._kept = Path(folder, "replaced_metadata.csv")
        exists = self.path.is_file()
        self.is_own = exists and self._mark.is_file() and self._digest() in self._mark.read_text().split()
        for name in OTHERS:
            if Path(folder, name).exists():
                raise InputError(
                    f"{folder}/{name}: is there already, and a dataset has one metadata file; move it away"
                )
        if exists and not self.is_own and not overwrite:
            raise InputError(
                f"{self.path}: was not written by this command, or was changed since; give --overwrite to replace it "
                f"(it is kept as {self._kept.name}), or move it away"
            )
        if exists and not self.is_own and self._kept.exists():
            raise InputError(f"{self._kept}: would be replaced by {self.path.name}; move one of them away")

    def write(self, rows: Sequence[Row]) -> None:
        """Write the rows. Columns that no row fills are left out."""
        columns = {
            "file_name": [row.video.name for row in rows],
            "control_name": [row.control.name if row.control else "" for row in rows],
            "text": [row.text for row in rows],
            "start": [row.start for row in rows],
            "end": [row.end for row in rows],
            "fps": ["" if row.video.fps is None else f"{row.video.fps:.10g}" for row in rows],
        }
        columns = {name: values for name, values in columns.items() if any(values)}
        content = io.StringIO()
        writer = csv.writer(content, lineterminator="\n")
        writer.writerows([list(columns), *zip(*columns.values())])
        data = content.getvalue().encode()
        digests = [sha256(data).hexdigest()]
        if self.is_own:
            digests.append(self._digest())
        elif self.path.is_file():
            write_atomic(self._kept, self.path.read_bytes())
        write_atomic(self._mark, "\n".join(digests).encode())  # of the old file too: a kill may leave either
        write_atomic(self.path, data)

    def _digest(self):
        return sha256(self.path.read_bytes()).hexdigest()
