"""Models that several files of tests share."""

import pytest

from .families import FAMILIES, KINDS
from .generating import endless


@pytest.fixture(scope="module")
def two_blocks():
    return endless(2)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=FAMILIES)
def family(request):
    return FAMILIES[request.param]


@pytest.fixture
def one_of(family):
    """One model of each family, in float64."""
    return next(kind for kind in KINDS.values() if kind.family is family and kind.mode == family.some_mode).model()
