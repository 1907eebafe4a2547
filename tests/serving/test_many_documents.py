"""Many documents become the contexts that each alone becomes, whoever reads them."""

import json
import shutil
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import (
    ManyDocuments,
    StoredContext,
    load_text_model,
    open_context,
    read_documents,
    text_tokens,
    write_context,
)
from ttt_e2e.storage.claims import claimed

from ..storage.holding import held_elsewhere
from ..training.processes import KILLED, exit_code, start
from .reading_workers import outcomes, request, worker
from .small import BOOK, files, save_text_model, small_text_model

TEXTS = {f"{number}.txt": BOOK[number : 40 * (number + 1)] for number in range(5)}


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(scope="module")
def place(text_model, tmp_path_factory):
    """A model, five documents, and what was read of them one after the other by one process."""
    place = tmp_path_factory.mktemp("place")
    save_text_model(text_model, place / "model")
    write_texts(place / "documents", TEXTS)
    assert [outcome.tokens > 0 for outcome in outcomes(request(place, place / "whole"))] == [True] * 5
    return place


def write_texts(folder, texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)


def contexts(folder):
    """Every file of every context; and nothing else lies there, no lock and no half of a context."""
    found = {path.name: files(path) for path in sorted(folder.iterdir()) if path.is_dir()}
    assert {path.name for path in folder.iterdir() if path.is_file()} == {"run.json"}
    assert not any(name.startswith(".") for name in found)
    return found


def assert_close(folder, expected):
    """Contexts that differ by no more than 1e-5 in any number, and in nothing else."""
    assert contexts(folder).keys() == contexts(expected).keys()
    for name in contexts(folder):
        one, other = (load_file(place / name / "context.safetensors") for place in (folder, expected))
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
        one, other = (json.loads((place / name / "context.json").read_text()) for place in (folder, expected))
        differ = {key for key in one if one[key] != other[key]}
        assert one.keys() == other.keys() and differ <= {"tensors", "checksum"}
        assert (folder / name / "documents.json").read_text() == (expected / name / "documents.json").read_text()


def test_each_context_is_that_of_the_document_alone(place, tmp_path):
    assert contexts(place / "whole").keys() == TEXTS.keys()
    loaded = load_text_model(str(place / "model"))  # weights that were made in memory lie there in another way
    for name, text in TEXTS.items():
        ids = text_tokens(text, loaded.tokenizer, begin=True)
        write_context(tmp_path / name, read_documents(loaded, StoredContext.new(loaded.model), [(name, ids)]))
        assert files(tmp_path / name) == files(place / "whole" / name)


@pytest.mark.parametrize("rows", [2, 3, 8])
def test_rows_side_by_side_differ_by_rounding_only(place, tmp_path, rows):
    assert len(outcomes(request(place, tmp_path / "rows", rows=rows))) == 5
    assert_close(tmp_path / "rows", place / "whole")


def test_a_context_that_was_read_in_a_batch_stands_alone(place, text_model, tmp_path):
    """It holds what one sequence needs, and reads on."""
    outcomes(request(place, tmp_path / "rows", rows=5))
    for name in TEXTS:
        folders = tmp_path / "rows" / name, place / "whole" / name
        caches = [TTTE2ECache.from_pretrained(folder, text_model.model) for folder in folders]
        assert caches[0].nbytes == caches[1].nbytes and caches[0].batch_size == 1
        ids = torch.tensor([list(range(5, 40))])
        with torch.no_grad():
            logits = [text_model.model(ids, cache=cache, use_cache=True).logits for cache in caches]
        torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_each_document_is_read_after_a_context(place, text_model, tmp_path, rows):
    before = files(place / "whole" / "4.txt")
    outcomes(request(place, tmp_path / "after", context=place / "whole" / "4.txt", rows=rows))
    start_at = open_context(place / "whole" / "4.txt", text_model.model)
    ids = text_tokens(TEXTS["0.txt"], text_model.tokenizer, begin=True)
    expected = read_documents(text_model, start_at, [("0.txt", ids)])
    found = open_context(tmp_path / "after" / "0.txt", text_model.model)
    assert found.documents == expected.documents and found.tokens == expected.tokens
    torch.testing.assert_close(
        found.cache.context.fast.own_copies().tensors, expected.cache.context.fast.own_copies().tensors
    )
    assert files(place / "whole" / "4.txt") == before


def test_what_is_there_is_not_read_again(place, tmp_path, monkeypatch):
    shutil.copytree(place / "whole", tmp_path / "part")
    for name in ("1.txt", "3.txt"):
        shutil.rmtree(tmp_path / "part" / name)
    assert [outcome.name for outcome in outcomes(request(place, tmp_path / "part"))] == ["1.txt", "3.txt"]
    assert contexts(tmp_path / "part") == contexts(place / "whole")
    assert outcomes(request(place, tmp_path / "part", rows=4)) == []


def test_one_that_cannot_be_read_costs_only_itself(place, tmp_path):
    write_texts(tmp_path / "documents", TEXTS)
    (tmp_path / "documents" / "2.txt").write_bytes(b"\xff")
    (tmp_path / "documents" / "empty.txt").write_text("\n")
    (tmp_path / "documents" / "locked.txt").mkdir()  # no document at all
    asked = request(place, tmp_path / "new", documents=str(tmp_path / "documents"), rows=2)
    wrong = {outcome.name: outcome.error for outcome in outcomes(asked) if outcome.error}
    assert wrong.keys() == {"2.txt", "empty.txt"} and "UTF-8" in wrong["2.txt"] and "empty" in wrong["empty.txt"]
    assert contexts(tmp_path / "new").keys() == TEXTS.keys() - {"2.txt"}
    (tmp_path / "documents" / "2.txt").write_text(TEXTS["2.txt"])
    assert {outcome.name: outcome.error is None for outcome in outcomes(asked)} == {"2.txt": True, "empty.txt": False}
    assert contexts(tmp_path / "new").keys() == TEXTS.keys()


def test_a_folder_that_holds_something_else_is_left_alone(place, tmp_path):
    outcomes(request(place, tmp_path / "new"))
    shutil.rmtree(tmp_path / "new" / "1.txt")
    shutil.copytree(tmp_path / "new" / "0.txt", tmp_path / "new" / "1.txt")
    (tmp_path / "new" / "3.txt" / "documents.json").write_text("{}")
    before = contexts(tmp_path / "new")
    errors = [outcome.error for outcome in outcomes(request(place, tmp_path / "new"))]
    assert len(errors) == 2 and "the context of 0.txt: move it away" in errors[0] and "3.txt: " in errors[1]
    assert contexts(tmp_path / "new") == before


def test_a_document_that_another_process_reads_is_waited_for(place, tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_e2e.serving.many_documents.PAUSE", 0.05)
    reading, found = ManyDocuments(request(place, tmp_path / "new")), []
    with held_elsewhere(claimed, tmp_path / "new" / "1.txt"):
        thread = threading.Thread(target=lambda: found.extend(reading.read(reading.shared_out())))
        thread.start()
        while len(found) < 4:
            time.sleep(0.01)
        thread.join(0.3)
        assert thread.is_alive() and "1.txt" not in [outcome.name for outcome in found]
    thread.join()  # the other one is dead: its claim went with it
    assert [outcome.name for outcome in found][-1] == "1.txt" and contexts(tmp_path / "new") == contexts(
        place / "whole"
    )


def test_shares_begin_apart_and_are_all_that_is_left(place, tmp_path):
    orders = [
        ManyDocuments(request(place, tmp_path / "new", process=process, processes=3)).shared_out()
        for process in range(3)
    ]
    assert [order[0] for order in orders] == [[0], [1], [2]]
    assert [order[:2] for order in orders][:2] == [[[0], [3]], [[1], [4]]]
    assert all(sorted(order) == [[number] for number in range(5)] for order in orders)
    by_length = ManyDocuments(request(place, tmp_path / "new", rows=2)).shared_out()
    assert by_length == [[4, 3], [2, 1], [0]]


def test_another_reading_is_refused(place, text_model, tmp_path):
    before = files(place / "whole" / "0.txt")
    save_text_model(small_text_model(seed=1), tmp_path / "model")
    write_texts(tmp_path / "documents", TEXTS)
    for other, named in {
        tmp_path: "was begun with documents=",
        place: "split_special_tokens",
    }.items():
        options = {} if other == tmp_path else {"split_special_tokens": False}
        with pytest.raises(ValueError, match=named):
            ManyDocuments(request(other, place / "whole", **options))
    shutil.rmtree(tmp_path / "documents")
    with pytest.raises(ValueError, match=r"model\.weights"):
        ManyDocuments(request(tmp_path, place / "whole", documents=str(place / "documents")))
    with pytest.raises(ValueError, match="context="):
        ManyDocuments(request(place, place / "whole", context=place / "whole" / "0.txt"))
    assert files(place / "whole" / "0.txt") == before


def test_what_does_not_fit_is_refused_before_anything_is_read(place, text_model, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="rows=0"):
        ManyDocuments(request(place, tmp_path / "new", rows=0))
    with pytest.raises(ValueError, match="lies in documents="):
        ManyDocuments(request(place, place / "documents" / "contexts"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    with pytest.raises(ValueError, match="holds other files"):
        ManyDocuments(request(place, tmp_path / "full"))
    with monkeypatch.context() as patch:
        patch.setattr("ttt_e2e.storage.disk.shutil.disk_usage", lambda path: shutil._ntuple_diskusage(9, 0, 9))
        with pytest.raises(OSError, match="room for 5 learned contexts needs"):
            ManyDocuments(request(place, tmp_path / "new"))
    settings = json.loads((place / "model" / "config.json").read_text()) | {"test_time_training": False}
    shutil.copytree(place / "model", tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="test_time_training=False"):
        ManyDocuments(request(tmp_path, tmp_path / "new", documents=str(place / "documents")))


@pytest.mark.slow
def test_a_process_dies_and_costs_its_document_alone(place, tmp_path):
    """Of two processes one dies while it writes; the other reads its documents, the one it died in too."""
    output = tmp_path / "two"
    processes = [start(worker, place, output, number, 2, 2 if number else None) for number in range(2)]
    assert [exit_code(process) for process in processes] == [0, KILLED]
    assert contexts(output) == contexts(place / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4])
def test_two_hundred_documents_and_a_process_that_dies(place, tmp_path, count):
    """Every context is there in the end, equal, and nothing is half written; also where the last process has died."""
    write_texts(tmp_path / "documents", {f"{n:03}.txt": f"{n} {BOOK}"[: 40 + n] for n in range(200)})
    (tmp_path / "model").symlink_to(place / "model")
    assert all(outcome.tokens for outcome in outcomes(request(tmp_path, tmp_path / "whole")))
    output, dies_at = tmp_path / "shared", 100 // count
    processes = [start(worker, tmp_path, output, n, count, dies_at if n == count - 1 else None) for n in range(count)]
    codes = [exit_code(process) for process in processes]
    assert codes == [0] * (count - 1) + [KILLED]
    if count == 1:
        there = {path.name for path in output.iterdir() if not path.name.startswith(".")}
        assert len(there) == dies_at  # the contexts before it, and the record
    assert exit_code(start(worker, tmp_path, output, 0, 1)) == 0
    assert contexts(output) == contexts(tmp_path / "whole") and len(contexts(output)) == 200
