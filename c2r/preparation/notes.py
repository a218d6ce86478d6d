"""Results of slow steps, kept in a file: a command that was interrupted goes on where it was."""

import json
from pathlib import Path
from typing import Any

from c2r.files import digest


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
            for line in content.splitlines():
                try:
                    note = json.loads(line)
                    self._values[note["key"]] = note["value"]
                except (ValueError, KeyError, TypeError):  # cut short by a kill: what it held is found again
                    continue

    def get(self, *key: Any) -> Any:
        """Return the value of a key (anything that JSON can hold); None if there is none."""
        return self._values.get(digest(key))

    def add(self, value: Any, *key: Any) -> None:
        """Keep a value, which JSON can hold, under a key."""
        self._values[digest(key)] = value
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            # The key itself stands beside its digest for people who look into the file.
            line = json.dumps({"of": key, "key": digest(key), "value": value}, ensure_ascii=True)
            file.write(("" if self._ends_in_a_line else "\n") + line + "\n")
        self._ends_in_a_line = True
