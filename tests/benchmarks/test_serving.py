"""The benchmark of the server, in small: all is measured, and every answer is as long as was asked."""

import pytest

from ..serving.running import skip_without_server
from ..serving.small import small_text_model

SMALL = {"CLIENTS": 2, "WRITTEN": 4, "PROMPT": 8, "LONG": 2000, "LONG_WAITS": 2, "MANY": 12, "AT_ONCE": 2, "SETTLED": 2}


def test_everything_is_measured(monkeypatch):
    skip_without_server()
    from ttt_e2e.benchmarks import serving

    for name, value in SMALL.items():
        monkeypatch.setattr(serving, name, value)
    figures = serving.measure_serving(small_text_model())
    assert figures.one_by_one > 0 and figures.ratio == pytest.approx(figures.together / figures.one_by_one)
    assert figures.first_token_alone > 0 and all(seconds > 0 for seconds in figures.first_token_seconds)
    assert figures.requests == SMALL["MANY"] and abs(figures.memory_growth) < 2**30
