"""The token store: what is in it, when it is written anew, and that a half-written one is never used."""

import json
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from datasets import Dataset

from ttt_e2e.data import token_store, tokenize_documents, tokenizer, train_tokenizer

from .letters import documents_of, letters_tokenizer, store_of


@pytest.fixture
def calls(monkeypatch):
    """The number of texts in each call of the tokenizer."""
    counted = []

    def counting(texts, **named):
        counted.append(len(texts))
        return tokenizer.encode_documents(texts, **named)

    monkeypatch.setattr(token_store, "encode_documents", counting)
    return counted


def test_documents_are_laid_end_to_end(tmp_path):
    store = store_of(tmp_path, "ab", "", "c")
    assert store.tokens.tolist() == [0, 1, 2, 0, 0, 3] and store.tokens.dtype == np.uint16
    assert store.starts.tolist() == [0, 3, 4, 6] and store.starts.dtype == np.int64
    assert store.lengths().tolist() == [3, 1, 2]
    assert store.document(2).tolist() == [0, 3]
    assert isinstance(store.tokens, np.memmap) and isinstance(store.document(2), np.memmap)
    assert (store.num_tokens, store.num_documents, store.separator_id) == (6, 3, 0)
    assert store.names == ["0.txt", "1.txt", "2.txt"]


def test_pickled_store_is_only_its_folder(tmp_path):
    store = store_of(tmp_path, "abc" * 1000)
    assert store.tokens[1] == 1
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000 and pickle.loads(pickled).tokens.tolist() == store.tokens.tolist()


def test_documents_without_paths_are_numbered(tmp_path):
    store = tokenize_documents(Dataset.from_dict({"text": ["a", "b"]}), letters_tokenizer(), tmp_path)
    assert store.names == ["document 0", "document 1"]


def test_large_vocabulary_takes_four_bytes_per_token(tmp_path):
    large = letters_tokenizer()
    large.add_tokens([f"<{number}>" for number in range(2**16)])
    store = tokenize_documents(documents_of("a<65535>"), large, tmp_path)
    assert store.tokens.dtype == np.uint32
    assert store.tokens.tolist() == [0, 1, 27 + 65535]


def test_begin_token_of_the_tokenizer_is_not_added_twice(tmp_path):
    trained = tokenizer.train_tokenizer(["abc"], vocabulary_size=262)
    assert trained("a")["input_ids"][0] == trained.bos_token_id
    store = tokenize_documents(documents_of("abc"), trained, tmp_path)
    assert store.tokens.tolist() == trained("abc")["input_ids"]


def test_same_texts_are_tokenized_once(tmp_path, calls):
    first = store_of(tmp_path, "ab", "c")
    used = letters_tokenizer()
    used(["a", "bc"], truncation=True, max_length=1)  # leaves settings behind in the tokenizer
    second = tokenize_documents(documents_of("ab", "c"), used, tmp_path)
    assert calls == [2] and first.folder == second.folder


@pytest.mark.parametrize("texts", [["ab", "d"], ["c", "ab"], ["a", "bc"], ["ab", "c", ""], ["abc"]])
def test_other_texts_are_another_store(tmp_path, calls, texts):
    first, second = store_of(tmp_path, "ab", "c"), store_of(tmp_path, *texts)
    assert first.folder != second.folder and len(calls) == 2
    assert second.num_documents == len(texts)


def test_other_names_or_tokenizer_are_another_store(tmp_path):
    documents = documents_of("ab")
    other_tokenizer = letters_tokenizer()
    other_tokenizer.add_tokens(["ab"])
    stores = [
        tokenize_documents(documents, letters_tokenizer(), tmp_path),
        tokenize_documents(documents, letters_tokenizer(bos_token="z"), tmp_path),
        tokenize_documents(documents, other_tokenizer, tmp_path),
        tokenize_documents(Dataset.from_dict({"path": ["b"], "text": ["ab"]}), letters_tokenizer(), tmp_path),
    ]
    assert [store.tokens.tolist() for store in stores] == [[0, 1, 2], [26, 1, 2], [0, 27], [0, 1, 2]]
    assert [store.names for store in stores] == [["0.txt"]] * 3 + [["b"]]


def test_special_tokens_of_a_text_as_letters_or_as_tokens_are_two_stores(tmp_path):
    trained = train_tokenizer(["end begin"], 260)
    documents = documents_of("a<|end|>", "b")
    letters = tokenize_documents(documents, trained, tmp_path)
    tokens = tokenize_documents(documents, trained, tmp_path, split_special_tokens=False)
    begin, end = trained.bos_token_id, trained.eos_token_id
    assert trained.decode(letters.document(0)) == "<|begin|>a<|end|>" and end not in letters.tokens
    assert tokens.document(0).tolist() == [begin, *trained("a").input_ids[1:], end]
    assert letters.document(1).tolist() == tokens.document(1).tolist()
    assert tokenize_documents(documents, trained, tmp_path).folder == letters.folder != tokens.folder


def test_a_store_that_does_not_say_how_special_tokens_were_read_is_not_used(tmp_path, monkeypatch):
    settings, dumps = {}, json.dumps

    def without(value, **named):
        if isinstance(value, dict) and "split_special_tokens" in value:
            value = {name: part for name, part in value.items() if name != "split_special_tokens"}
            settings.update(value)
        return dumps(value, **named)

    with monkeypatch.context() as patch:
        patch.setattr(token_store.json, "dumps", without)
        former = tokenize_documents(documents_of("ab"), letters_tokenizer(), tmp_path)
    assert "texts" in settings
    assert tokenize_documents(documents_of("ab"), letters_tokenizer(), tmp_path).folder != former.folder


def flip_last_byte(path):
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def change_count(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": 4}))


DAMAGE = {
    "missing tokens": ("tokens.npy", Path.unlink),
    "missing starts": ("starts.npy", Path.unlink),
    "missing names": ("names.json", Path.unlink),
    "missing manifest": ("store.json", Path.unlink),
    "short tokens": ("tokens.npy", lambda path: path.write_bytes(path.read_bytes()[:-2])),
    "other tokens": ("tokens.npy", flip_last_byte),
    "other starts": ("starts.npy", flip_last_byte),
    "other names": ("names.json", lambda path: path.write_text('["9.txt", "1.txt"]')),
    "other manifest": ("store.json", change_count),
    "manifest cut off": ("store.json", lambda path: path.write_text(path.read_text()[:40])),
    "manifest of another shape": ("store.json", lambda path: path.write_text("[1, 2]")),
    "manifest that is no text": ("store.json", lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "manifest that is a folder": ("store.json", lambda path: (path.unlink(), path.mkdir())),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_store_is_written_anew(tmp_path, calls, monkeypatch, kind):
    warnings = []
    logger = SimpleNamespace(warning=warnings.append)
    monkeypatch.setattr("ttt_e2e.storage.cached_folder.logger", logger)
    folder = store_of(tmp_path, "ab", "c").folder
    name, damage = DAMAGE[kind]
    damage(folder / name)

    store = store_of(tmp_path, "ab", "c")
    assert calls == [2, 2]
    assert len(warnings) == 1 and str(folder) in warnings[0] and name in warnings[0]
    assert store.tokens.tolist() == [0, 1, 2, 0, 3] and store.names == ["0.txt", "1.txt"]
    store_of(tmp_path, "ab", "c")
    assert calls == [2, 2], "what was written anew is whole"


def test_store_that_was_opened_outlives_its_folder(tmp_path):
    store = store_of(tmp_path, "ab", "c")
    assert store.tokens[0] == 0
    shutil.rmtree(store.folder)
    store_of(tmp_path, "ab", "c")
    assert store.tokens.tolist() == [0, 1, 2, 0, 3]


def test_too_little_space_on_the_disk_is_an_error(tmp_path, monkeypatch, calls):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=500))
    with pytest.raises(OSError, match=r"a copy of the tokens needs 2028 bytes, .* only 500 left"):
        store_of(tmp_path, "a" * 2000, "")
    assert calls == []
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


def test_failure_half_way_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("ttt_e2e.data.texts.DOCUMENTS_PER_BATCH", 1)
    answers = iter([[[0, 1, 2]]])
    monkeypatch.setattr(token_store, "encode_documents", lambda texts, **named: next(answers))
    with pytest.raises(StopIteration):
        store_of(tmp_path, "ab", "c")
    assert [path for path in (tmp_path / "tokens").iterdir() if path.is_dir()] == []


def test_bad_documents_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="documents: there are none"):
        store_of(tmp_path)
    with pytest.raises(ValueError, match="the text of document 1 is None"):
        tokenize_documents(Dataset.from_dict({"text": ["a", None]}), letters_tokenizer(), tmp_path)


PROCESSES = """
import json, multiprocessing, os, signal, sys
from pathlib import Path
from datasets import Dataset
from ttt_e2e.data import load_tokenizer, texts, token_store, tokenize_documents, tokenizer

folder = Path(sys.argv[1])
texts.DOCUMENTS_PER_BATCH = 1

def build(number, kill_at, together):
    calls = 0

    def encode(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return tokenizer.encode_documents(*arguments, **named)

    token_store.encode_documents = encode
    documents = Dataset.from_dict({"text": ["ab", "c", "def"]})
    loaded = load_tokenizer(folder)
    together.wait()
    store = tokenize_documents(documents, loaded, folder)
    (folder / f"result-{number}").write_text(json.dumps({"calls": calls, "tokens": store.tokens.tolist()}))

def run(*kill_at):
    # Forked before any thread was started: one import serves all processes.
    context = multiprocessing.get_context("fork")
    together = context.Barrier(len(kill_at))
    processes = [context.Process(target=build, args=(*one, together)) for one in enumerate(kill_at)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    left = sorted(path.suffix for path in (folder / "tokens").iterdir() if path.is_dir())
    print(json.dumps({"exit": [process.exitcode for process in processes], "left": left}))

run(2)
run(None, None)
"""


@pytest.mark.slow
def test_killed_build_is_never_used_and_two_builds_share_the_work(tmp_path):
    letters_tokenizer().save_pretrained(tmp_path)
    command = [sys.executable, "-c", PROCESSES, str(tmp_path)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, timeout=120)
    killed, both = map(json.loads, run.stdout.splitlines())
    assert killed == {"exit": [-signal.SIGKILL], "left": [".part"]}
    assert both == {"exit": [0, 0], "left": [""]}
    results = [json.loads((tmp_path / f"result-{number}").read_text()) for number in range(2)]
    assert [result["tokens"] for result in results] == [[0, 1, 2, 0, 3, 0, 4, 5, 6]] * 2
    assert sorted(result["calls"] for result in results) == [0, 3], "one of them tokenized, the other one waited"


def test_data_removed_during_a_run_is_read_on_or_named(tmp_path):
    store = tokenize_documents(Dataset.from_dict({"text": ["ab", "cde"]}), letters_tokenizer(), tmp_path)
    expected = store.tokens.tolist()
    shutil.rmtree(store.folder)
    assert store.tokens.tolist() == expected and store.document(1).tolist() == expected[3:]
    with pytest.raises(FileNotFoundError, match=r"has been removed.*start the command again, which prepares it anew"):
        pickle.loads(pickle.dumps(store))
