"""Results of slow steps, kept in a file: a command that was interrupted goes on where it was."""

import json
import logging
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from c2r import InputError
from c2r.files import digest, parse_json

logger = logging.getLogger(__name__)


class _Note(TypedDict):
    """One line."""

    of: list[Any]  # the key
    key: str  # its digest
    value: Any


class Notes:
    """Values by key, one JSON line each.

    Args:
        path: the file; created with the first value.
    """

    def __init__(self, path: Path):
        self.path = path
        self._values: dict[str, Any] = {}
        self._ends_in_a_line = True
        if path.is_file():
            content = path.read_text(encoding="utf-8", errors="replace")
            self._ends_in_a_line = content.endswith("\n")
            for number, line in enumerate(content.split("\n"), 1):
                note = self._parse(line, _Note, f"line {number}") if line else None
                if note is not None:
                    self._values[note["key"]] = note["value"]

    def get(self, kind: Any, *key: Any) -> Any:
        """Return the value of a key (anything that JSON can hold); None if there is none of this type."""
        value = self._values.get(digest(key))
        return None if value is None else self._parse(json.dumps(value), kind, f"note of {key[:2]}")

    def _parse(self, text, kind, where):
        try:
            return parse_json(text, kind, where)
        except InputError as error:  # for example a line cut short by a kill
            problem = str(error).partition("; ")[0]
            logger.warning(f"{self.path}: {problem}; ignored, and found again")
            return None

    def add(self, value: Any, *key: Any) -> None:
        """Keep a value, which JSON can hold, under a key."""
        self._values[digest(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # The key itself stands beside its digest for people who look into the file.
            line = json.dumps({"of": key, "key": digest(key), "value": value}, ensure_ascii=True)
            file.write(("" if self._ends_in_a_line else "\n") + line + "\n")
        self._ends_in_a_line = True
