"""`ttt-e2e read --documents`: what it says, how it ends, and that two processes of torchrun read what one reads."""

import os
import subprocess
import sys

import pytest
import torch

from ..serving.small import BOOK, files, small_text_model
from .context_commands import fill_place, refused, run


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = fill_place(tmp_path_factory.mktemp("place"), small_text_model())
    (place / "library").mkdir()
    for number in range(4):
        (place / "library" / f"{number}.txt").write_text(BOOK[number:])
    return place


def read(place, output, *options, documents="library"):
    options = ("--documents", place / documents, "--output", output, "--cache", place / "cache", *options)
    return run(place, "read", *options)


def contexts(folder):
    return {path.name: files(path) for path in sorted(folder.iterdir()) if path.is_dir()}


def test_every_document_gets_a_context_of_its_own(place, tmp_path):
    done = read(place, tmp_path / "out")
    assert done.exit_code == 0 and "contexts of 4 documents, 0 of which were there before" in done.stdout
    assert done.stderr.startswith("Loading")
    for number in range(4):
        alone = ("--document", place / "library" / f"{number}.txt", "--output", tmp_path / str(number))
        assert run(place, "read", *alone).exit_code == 0
        assert files(tmp_path / str(number)) == files(tmp_path / "out" / f"{number}.txt")
    before = contexts(tmp_path / "out")
    done = read(place, tmp_path / "out", "--rows", 3)
    assert done.exit_code == 0 and "4 of which were there before" in done.stdout and "0 tokens" in done.stdout
    assert contexts(tmp_path / "out") == before


def test_an_unreadable_document_is_told_and_left_out(place, tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "good.txt").write_text(BOOK)
    (tmp_path / "library" / "latin.txt").write_bytes("Fluß".encode("latin-1"))
    (tmp_path / "library" / "rows.jsonl").write_text('{"text": "the mill"}\n{"text": 3}\n')
    done = read(place, tmp_path / "out", documents=tmp_path / "library")
    assert done.exit_code == 1 and "contexts of 2 documents" in done.stdout
    assert "Left out: latin.txt: is not UTF-8 text" in done.stderr and "rows.jsonl, line 2" in done.stderr
    assert "2 documents could not be read" in done.stderr
    assert list(contexts(tmp_path / "out")) == ["good.txt", "rows.jsonl-00000000"]
    (tmp_path / "library" / "latin.txt").write_text("Fluß")
    (tmp_path / "library" / "rows.jsonl").write_text('{"text": "the mill"}\n{"text": "3"}\n')
    done = read(place, tmp_path / "out", documents=tmp_path / "library")
    assert done.exit_code == 0 and "contexts of 4 documents, 2 of which" in done.stdout


def test_an_interrupted_reading_says_how_it_goes_on(place, tmp_path, monkeypatch):
    def interrupt(*arguments, **keywords):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.serving.many_documents.read_side_by_side", interrupt)
        done = read(place, tmp_path / "out")
    assert done.exit_code == 130 and "goes on with the documents that are left" in done.stderr
    assert contexts(tmp_path / "out") == {}
    assert read(place, tmp_path / "out").exit_code == 0 and len(contexts(tmp_path / "out")) == 4


def test_what_does_not_fit_is_refused(place, tmp_path):
    assert refused(run(place, "read", "--output", tmp_path / "out"), "either --document", "--documents")
    both = ("--document", place / "book.txt", "--documents", place / "library", "--output", tmp_path / "out")
    assert refused(run(place, "read", *both), "either --document")
    assert refused(read(place, tmp_path / "out", documents="missing.txt"), "missing.txt", "no such file")
    assert refused(read(place, place / "library" / "out"), "lies in documents=")
    assert refused(read(place, tmp_path / "out", "--rows", 0), "--rows")
    assert not list(tmp_path.iterdir())


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # "multi_gpu" means several processes, on a CPU as well: with "cpu" it starts one.
    "accelerate launch": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS.values(), ids=LAUNCHERS)
def test_two_processes_of_a_launcher(place, tmp_path, launcher):
    """They read what one reads, byte for byte, and the launcher ends as they do: with an error where there was one."""
    (place / "library" / "bad.txt").write_bytes(b"\0")
    assert read(place, tmp_path / "one").exit_code == 1
    command = [sys.executable, "-m", *launcher, "-m", "ttt_e2e.cli.main"]
    command += ["read", "--model", place / "model", "--documents", place / "library"]
    command += ["--output", tmp_path / "two", "--cache", place / "cache"]
    variables = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "COLUMNS": "400"}  # sums round as threads share them
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode != 0 and done.stderr.count("Left out: bad.txt") == 1
    assert done.stderr.count("Loading weights:   0%") == 2  # each process loads the model
    assert done.stdout.count("contexts of 4 documents") == 1
    assert contexts(tmp_path / "two") == contexts(tmp_path / "one")
