"""The example for Ray on this machine: what its workers read is what one process reads, also where one of them dies."""

import os
import signal
import sys
from pathlib import Path

import pytest

from ..scripts import load_script
from ..serving.reading_workers import outcomes, request
from ..serving.small import BOOK, files, save_text_model, small_text_model

ray = pytest.importorskip("ray", reason="needs the extra ray")
pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_read.py"
COUNT = 200


@pytest.fixture(scope="module")
def example():
    """The example as a module, whose classes travel to the workers as they are."""
    module = load_script(EXAMPLE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, module.__name__, module)  # where cloudpickle looks for it
        ray.cloudpickle.register_pickle_by_value(module)
        yield module


@pytest.fixture(scope="module")
def cluster():
    variables = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.environ.get("PYTHONPATH", "")}
    try:
        ray.init(
            num_cpus=5, include_dashboard=False, object_store_memory=100 * 2**20, runtime_env={"env_vars": variables}
        )
    except Exception as error:  # a machine on which Ray does not start
        pytest.skip(f"Ray does not start here: {error}")
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("place")
    save_text_model(small_text_model(), place / "model")
    (place / "documents").mkdir()
    for number in range(COUNT):
        (place / "documents" / f"{number:03}.txt").write_text(f"{number} {BOOK}"[: 40 + number])
    assert all(outcome.tokens for outcome in outcomes(request(place, place / "whole")))
    return place


def contexts(folder):
    found = {path.name: files(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"run.json"}
    return found


def dying(reader, marker, count):
    """A reader of which one, once, is killed in the middle of writing its context number `count`."""

    class Dying(reader):
        def __init__(self, request):
            super().__init__(request)
            from ttt_e2e.storage import disk

            replace, written = os.replace, []

            def replaced(source, target):
                if Path(source).is_dir():
                    written.append(target)
                    if len(written) == count and not marker.exists():
                        marker.write_text(str(target))
                        os.kill(os.getpid(), signal.SIGKILL)
                replace(source, target)

            disk.os.replace = replaced

    return Dying


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_a_worker_dies_and_every_context_is_there(example, cluster, place, tmp_path, workers):
    marker = tmp_path / "died"
    reader = dying(example.Reader, marker, COUNT // (2 * workers))
    found = list(example.read_on_ray(request(place, tmp_path / "out"), workers, reader=reader))
    assert marker.exists() and {outcome.name for outcome in found} == {f"{n:03}.txt" for n in range(COUNT)}
    assert not any(outcome.error for outcome in found)
    assert contexts(tmp_path / "out") == contexts(place / "whole")


def test_what_cannot_be_read_is_told(example, cluster, place, tmp_path):
    (tmp_path / "documents").mkdir()
    (tmp_path / "documents" / "a.txt").write_text(BOOK)
    (tmp_path / "documents" / "b.txt").write_bytes(b"\0")
    asked = request(place, tmp_path / "out", documents=str(tmp_path / "documents"), rows=2)
    found = {outcome.name: outcome.error for outcome in example.read_on_ray(asked, 1)}
    assert found["a.txt"] is None and "NUL" in found["b.txt"] and list(contexts(tmp_path / "out")) == ["a.txt"]
