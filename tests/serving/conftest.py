"""A server that the tests of a file share."""

import pytest

from .running import Served, skip_without_server


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    skip_without_server()
    with Served(tmp_path_factory.mktemp("contexts")) as served:
        yield served
