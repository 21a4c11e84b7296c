"""`docs/support-matrix.md` says what is so: every cell of it is run, and the page is made of the outcomes."""

from __future__ import annotations

import pytest

from support_matrix.cell import ACCEPTABLE, Outcome
from support_matrix.document import document
from support_matrix.guides import OPERATIONS_IN_GUIDES, ROWS_IN_GUIDES, unsaid
from support_matrix.operations import OPERATIONS
from support_matrix.table import CELLS, DOCUMENT, REFUSED, SUBJECTS, missing, read_outcomes, run

COMMITTED = read_outcomes()


@pytest.mark.parametrize(("row", "operation"), CELLS, ids=lambda part: part.replace("`", "").replace(" ", "-"))
def test_a_cell_is_as_the_page_says(row, operation, tmp_path):
    if reason := missing(row):
        pytest.skip(f"{reason}; the page shows what was found where it is")
    outcome = run(row, operation, tmp_path)
    assert outcome.kind in ACCEPTABLE, str(outcome)
    assert str(outcome) == COMMITTED[row][operation], "If that is meant to be: make matrix, and look at the diff."


def test_the_page_has_every_cell_and_no_other():
    assert {(row, operation) for row, cells in COMMITTED.items() for operation in cells} == set(CELLS)


def test_every_cell_works_or_has_its_reason():
    for cells in COMMITTED.values():
        for outcome in map(Outcome.of, cells.values()):
            assert outcome.kind in ACCEPTABLE
            assert bool(outcome.reason) == (outcome.kind != "works")


def test_what_is_refused_altogether_is_and_the_rest_trains_or_says_why_not():
    assert {Outcome.of(COMMITTED[row]["adapt"]).kind for row in REFUSED} == {"refused"}
    assert all(any(cell == "works" for cell in COMMITTED[row].values()) for row in SUBJECTS)


def test_the_page_is_made_of_the_outcomes():
    assert DOCUMENT.read_text(encoding="utf-8") == document(COMMITTED), "Run: make matrix"


def test_a_guide_says_how_to_do_each_operation_and_each_row():
    assert OPERATIONS_IN_GUIDES.keys() == OPERATIONS.keys()
    assert ROWS_IN_GUIDES.keys() == SUBJECTS.keys() | REFUSED.keys()
    page, places = DOCUMENT.read_text(encoding="utf-8"), {*OPERATIONS_IN_GUIDES.values(), *ROWS_IN_GUIDES.values()}
    assert [place for place in places if f"]({place})" not in page] == []
    assert unsaid() == []
