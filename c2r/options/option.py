"""An option, and a command: its options by group, and its check across them."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from c2r.options.types import ANY_TEXT

#: Values of `Option.on_resume`.
FROM_COMMAND_LINE = "from the command line"
MUST_NOT_CHANGE = "must not change"
NEW_BASELINE = "from the command line; a change starts a new baseline of validation"


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Args:
        name: without the dashes, as Diffusers names it where Diffusers has it.
        help: one sentence that needs no other option's help to be understood.
        type: reads and checks one value.
        default: value where none is given.
        metavar: placeholder for the value in --help.
        several: takes one or more values, a list.
        repeatable: may be given several times, a list.
        required: has no default.
        common: shown by --help; --help-all shows all options.
        on_resume: value that a resumed run uses: FROM_COMMAND_LINE, MUST_NOT_CHANGE, or a sentence.
    """

    name: str
    help: str
    type: Any = ANY_TEXT
    default: Any = None
    metavar: str | None = None
    several: bool = False
    repeatable: bool = False
    required: bool = False
    common: bool = False
    on_resume: str = FROM_COMMAND_LINE

    @property
    def default_text(self) -> str:
        """The default as on a command line."""
        values = self.default if isinstance(self.default, list) else [self.default]
        return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


@dataclass(frozen=True)
class Command:
    """A command: what --help says first, its options by group, its check across options, and its presets.

    `preset` is called with the values that the command line and --config give, and returns values of other options;
    what is given wins over them.
    """

    prog: str
    description: str
    groups: dict[str, list[Option]]
    check: Callable[[Namespace], object] = field(default=lambda args: None)
    preset: Callable[[dict[str, Any]], dict[str, Any]] = field(default=lambda given: {})

    @property
    def options(self) -> dict[str, Option]:
        """All options by name."""
        return {option.name: option for options in self.groups.values() for option in options}
