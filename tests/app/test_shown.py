"""What the page says and draws: right numbers, and nobody's text as markup."""

import re
from itertools import pairwise

import pytest

from ttt_e2e.app import Comparison, ModelQueue, Session
from ttt_e2e.app.chart import draw_curves, ticks
from ttt_e2e.app.wording import comparison_table, numbers, sentence, where_it_stands
from ttt_e2e.serving import ReadDocument, StoredContext

from ..serving.small import BOOK, small_text_model

HARM = "<script>alert('&')</script>"


@pytest.fixture(scope="module")
def shown():
    """Progress while a document with a harmful name is read: before, in between and in the end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("ttt_e2e.app.session.PIECE_TOKENS", 48)
        return progress_of_reading()


def progress_of_reading():
    session = Session(small_text_model(), ModelQueue())
    found = [session.progress()]
    session.add_document(HARM, BOOK * 3)
    for _ in session.read_on():
        found.append(session.progress())
    return found


def test_a_curve_has_its_points_within_the_picture(shown):
    for progress in shown:
        drawn = draw_curves(progress)
        lines = re.findall(r'<polyline class="(\w+)" points="([^"]*)"', drawn)
        assert [kind for kind, _ in lines] == ["plain", "learning"]
        for (_, path), curve in zip(lines, (progress.plain, progress.learning), strict=True):
            places = [tuple(map(float, place.split(","))) for place in path.split()]
            assert len(places) == len(curve.points())
            assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in places)
            losses = [loss for _, loss in curve.points()]
            highest = max(range(len(losses)), key=losses.__getitem__, default=None)
            assert highest is None or places[highest][1] == min(y for _, y in places)
        assert f'data-points="{len(progress.learning.points())}"' in drawn


@pytest.mark.parametrize(("low", "high"), [(1.81, 3.3), (0, 0.004), (2, 2), (0, 190_658), (-3, 12)])
def test_ticks_are_round_and_span_the_range(low, high):
    first, last, marks = ticks(low, high, 4)
    assert first <= low and high <= last and first < last and 2 <= len(marks) <= 7
    steps = {round(right - left, 9) for left, right in pairwise(marks)}
    assert len(steps) == 1 and float(f"{steps.pop():.2g}") == pytest.approx((last - first) / (len(marks) - 1))


def test_texts_of_others_are_no_markup(shown):
    empty = StoredContext.new(small_text_model().model)
    other = StoredContext(empty.cache, (ReadDocument(HARM, 3),))
    table = comparison_table(other, HARM, other, Comparison((0.0, 0.0), None, None, 0))
    for html in (sentence(HARM), where_it_stands(shown[1], False), draw_curves(shown[1]), numbers(shown[1]), table):
        assert "<script" not in html
    assert "&lt;script&gt;" in where_it_stands(shown[1], False) and "&lt;script&gt;" in table


def test_numbers_are_those_of_the_progress(shown):
    last = shown[-1]
    html = numbers(last)
    for text in (
        f"{last.learning.mean:.3f}",
        f"{last.plain.mean:.3f}",
        f"{last.tokens:,}",
        f"{last.kept / 1024:.0f} KiB",
    ):
        assert text in html
    assert "Reading" in where_it_stands(shown[1], False) and "Paused" in where_it_stands(shown[1], True)
    assert "is read" in where_it_stands(last, True) and "Nothing has been read" in where_it_stands(shown[0], True)
