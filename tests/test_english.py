"""The language of code and documents: present-day words, and first lines that can be understood alone."""

import ast
import re
from pathlib import Path

from c2r.options import COMMANDS
from tests.helpers.source import ROOT, require_none

#: Old or private words, each with what to write instead.
INSTEAD = {
    r"mend(s|ed|ing)?": "fix, correct",
    "anew": "again, from scratch",
    "amid(st)?": "among, while",
    "midst": "middle",
    "borne": "tolerated, carried",
    "heed(s|ed|ing)?": "follow, obey, take into account",
    "hitherto": "so far",
    "heretofore": "so far",
    "henceforth": "from now on",
    "hereby": "leave it out",
    "therein": "in it",
    "thereof": "of it",
    "thereby": "so, by this",
    "thereupon": "then",
    "whence": "from where",
    "thence": "from there",
    "wherein": "in which",
    "whereof": "of which",
    "whereupon": "then",
    "lest": "so that not",
    "albeit": "although",
    "betwixt": "between",
    "astride": "across, on both sides of",
    "for ever": "forever, without end",
    "for want of": "for lack of",
    "says so": "prints a warning",
    "is told": "is printed, is reported",
    "are told": "are printed, are reported",
    ", and told": ", and reported",
}
OLD_WORDS = re.compile(rf"(?<!\w)({'|'.join(INSTEAD)})(?!\w)", re.IGNORECASE)
#: Openings that need the code below them to be understood.
HEADLESS = ("What", "Whether", "Of", "How", "Which", "Who", "Whose", "Where", "Why")
SUFFIXES = (".py", ".md", ".yaml", ".toml", ".cff", ".in")


def files():
    """Yield the text files of the project: those at the root, and those in its folders."""
    folders = (ROOT / name for name in (".ci", "accelerate_configs", "benchmarks", "c2r", "docs", "tests"))
    for path in sorted([*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]):
        if path.is_file() and (path.suffix in SUFFIXES or path.parent.name == ".ci") and path != Path(__file__):
            yield path


def code(*folders):
    for path in files():
        if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders:
            yield path, ast.parse(path.read_text())


def suggestion(word):
    return next(instead for pattern, instead in INSTEAD.items() if re.fullmatch(pattern, word, re.IGNORECASE))


def test_no_old_or_private_words():
    require_none(
        f"{path.relative_to(ROOT)}:{number}: {match[0]}; write: {suggestion(match[0])}"
        for path in files()
        for number, line in enumerate(path.read_text().splitlines(), 1)
        for match in OLD_WORDS.finditer(line)
    )


def test_docstrings_open_with_a_verb_or_a_noun():
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    require_none(
        f"{path.relative_to(ROOT)}:{node.body[0].lineno}: {docstring.splitlines()[0]}"
        for path, tree in code("c2r", "benchmarks", "train_phase1.py", "train_phase2.py")
        for node in ast.walk(tree)
        if isinstance(node, kinds)
        for docstring in [ast.get_docstring(node)]
        if docstring and re.match(r"\W*\w+", docstring)[0].lstrip("`\"'{(") in HEADLESS
    )


def test_help_texts_open_with_a_verb_or_a_noun():
    require_none(
        f"{command.prog} --{option.name}: {option.help}"
        for command in COMMANDS
        for option in command.options.values()
        if not option.help or option.help.split()[0].strip(",:").capitalize() in HEADLESS
    )


def test_names_of_tests_are_short():
    require_none(
        f"{path.relative_to(ROOT)}:{node.lineno}: {len(node.name)} characters; at most 79: {node.name}"
        for path, tree in code("tests")
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_") and len(node.name) >= 80
    )
