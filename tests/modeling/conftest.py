"""Models that several files of tests share."""

import pytest

from .generating import endless


@pytest.fixture(scope="module")
def two_blocks():
    return endless(2)
