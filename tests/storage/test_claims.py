"""One process at a time writes a folder, and its claim goes with it; of a file that several write, one stays, whole."""

import subprocess
import sys

import pytest

from ttt_e2e.storage.claims import RUN_LOCK, claimed, claimed_run
from ttt_e2e.storage.disk import folder_written_whole, written_whole
from ttt_e2e.storage.record import check_output

from .holding import held_elsewhere


@pytest.mark.parametrize("claim", [claimed, claimed_run])
def test_the_holder_is_named_and_a_dead_ones_claim_is_taken_over(tmp_path, claim):
    folder = tmp_path / "new" / "folder"
    with held_elsewhere(claim, folder) as holder:
        message = rf"process {holder.pid} on .* is writing there; wait for its end"
        with pytest.raises(ValueError, match=message), claim(folder):
            raise AssertionError("two hold it")
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(left) == 1  # the note of the dead one
    check_output(folder, resume=False, besides={RUN_LOCK})
    with claim(folder), claim(folder):
        pass
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_claim_leaves_nothing_but_what_was_written(tmp_path):
    with claimed_run(tmp_path / "a" / "empty"), claimed(tmp_path / "b" / "nothing"):
        pass
    assert list(tmp_path.iterdir()) == []
    with claimed_run(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run" / "run.json").write_text("{}")
    assert [path.name for path in (tmp_path / "a" / "run").iterdir()] == ["run.json"]


def test_a_folder_that_another_process_writes_is_left_alone(tmp_path):
    part = tmp_path / ".model.part"
    part.mkdir()
    (part / "weights").write_text("half of the other's")
    refused = pytest.raises(ValueError, match="is writing there")
    with held_elsewhere(claimed, tmp_path / "model"), refused, folder_written_whole(tmp_path / "model"):
        raise AssertionError("it was begun")
    assert (part / "weights").read_text() == "half of the other's"


def test_a_file_that_two_processes_write_is_whole(tmp_path):
    other = f"""
import sys
from pathlib import Path
from ttt_e2e.storage.disk import written_whole
with written_whole(Path({str(tmp_path / "file")!r})) as temporary:
    temporary.write_text("the other's")
"""
    with written_whole(tmp_path / "file") as temporary:
        temporary.write_text("this one's")
        subprocess.run([sys.executable, "-c", other], check=True)
        assert (tmp_path / "file").read_text() == "the other's"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "this one's"}


def test_a_folder_in_which_nothing_can_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"nothing can be written to .*file"), claimed(tmp_path / "file" / "folder"):
        raise AssertionError("it was begun")
