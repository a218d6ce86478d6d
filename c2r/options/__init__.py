"""Every option of every command, declared once: name, type with its range, default, help.

`python -m c2r.options` prints all of them as Markdown: docs/options.md.
"""

from c2r.options.tools import (
    APP,
    ENCODE,
    ESTIMATE,
    EVALUATE,
    EXPORT,
    GENERATE,
    PREPARE,
    QUICKSTART,
    REPORT,
    STUDY,
    TOY,
)
from c2r.options.training import PHASE1, PHASE2

COMMANDS = (PHASE1, PHASE2, PREPARE, ENCODE, GENERATE, EVALUATE, APP, EXPORT, REPORT, ESTIMATE, QUICKSTART, STUDY, TOY)

__all__ = [
    "APP",
    "COMMANDS",
    "ENCODE",
    "ESTIMATE",
    "EVALUATE",
    "EXPORT",
    "GENERATE",
    "PHASE1",
    "PHASE2",
    "PREPARE",
    "QUICKSTART",
    "REPORT",
    "STUDY",
    "TOY",
]
