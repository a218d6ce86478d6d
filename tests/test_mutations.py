"""The list of faults, and the tool that plants them."""

import re
from dataclasses import replace

import pytest

from tests.helpers.source import ROOT, require_none
from tests.mutate import Outcome, mutated, record
from tests.mutations import MUTATIONS


def text_of(mutation):
    return (ROOT / mutation.file).read_text()


def test_the_old_text_of_each_fault_still_occurs_once():
    require_none(
        f"{mutation.file}: {mutation.name}: its old text occurs {count} times; adapt it in tests/mutations.py"
        for mutation in MUTATIONS
        if (count := text_of(mutation).count(mutation.old)) != 1
    )


def test_each_fault_is_python_and_changes_its_file():
    for mutation in MUTATIONS:
        assert mutation.new != mutation.old, mutation.name
        compile(mutated(text_of(mutation), mutation), mutation.name, "exec")
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


def test_the_tests_of_each_fault_exist():
    for test in {mutation.tests for mutation in MUTATIONS}:
        path, _, name = test.partition("::")
        assert (ROOT / path).is_file(), test
        assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test


def test_a_text_that_does_not_occur_exactly_once_is_refused():
    mutation = MUTATIONS[0]
    for text in ("", 2 * mutation.old):
        with pytest.raises(ValueError, match=f"{mutation.name}: its old text occurs"):
            mutated(text, mutation)


def test_the_record_keeps_the_rows_of_other_faults_and_counts_all():
    found, survived = MUTATIONS[0], replace(MUTATIONS[1], remark="because it is harmless")
    first = record([Outcome(found, "tests/test_a.py::test_b", 7.4), Outcome(MUTATIONS[1], "tests/test_c.py", 3.0)])
    assert "2 of 2 faults were found (100.0%)" in first
    text = record([Outcome(survived, None, 5.0)], first)
    assert "1 of 2 faults were found (50.0%)" in text
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert rows[1:] == [
        f"| {found.name} | `{found.file}` | `tests/test_a.py::test_b` | 7 |",
        f"| {survived.name} | `{survived.file}` | **survived** | 5 |",
    ]
