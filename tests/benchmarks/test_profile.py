"""A profile accounts for all of the time, and counts what products there are."""

import pytest
import torch

from ttt_e2e.benchmarks.profile import KINDS, PROFILED, PYTHON, arithmetic_seconds, product_rate, profile, profiled

from .test_speed import small_works


def test_the_parts_are_all_of_the_time():
    left, right = torch.randn(2, 256, 256)
    parts = profile(lambda: left @ right)
    assert set(KINDS) | {PYTHON} <= set(parts) and all(seconds >= 0 for seconds in parts.values())
    assert parts["matrix products"] > parts["copies"] == 0


def test_products_are_counted():
    left, right = torch.randn(2, 64, 64)
    assert arithmetic_seconds(lambda: left @ right @ right, rate=1.0) == 2 * 2 * 64**3
    assert product_rate(size=64, rounds=1) > 0


@pytest.mark.slow
def test_every_system_is_profiled():
    tables, rate = profiled(small_works())
    assert [table.header[1:] for table in tables] == 3 * [list(PROFILED)] and rate > 0
    for table in tables:
        assert {"all", "products alone"} <= {row[0] for row in table.rows}
