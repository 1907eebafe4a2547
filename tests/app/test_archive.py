"""Saved contexts may come from strangers: whatever is in the file, it is refused with what to do, and nothing else."""

import io
import json
import zipfile

import pytest

from ttt_e2e.app import ModelQueue, Session, unpack_context
from ttt_e2e.app.archive import FILES

from ..serving.small import BOOK, small_text_model


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(scope="module")
def saved(text_model, tmp_path_factory):
    """A good file, as bytes."""
    session = Session(text_model, ModelQueue())
    session.add_document("book", BOOK)
    list(session.read_on())
    path = tmp_path_factory.mktemp("saved") / "book.zip"
    session.save(path)
    return path.read_bytes()


def members(saved):
    with zipfile.ZipFile(io.BytesIO(saved)) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def packed(path, entries, compression=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


def test_a_good_file_is_packed_as_anybody_packs(text_model, saved, tmp_path):
    path = packed(tmp_path / "book.zip", members(saved).items())
    assert unpack_context(path, text_model.model).documents[0].name == "book"


@pytest.mark.parametrize(
    "name", ["../evil.json", "/etc/evil", "context.json/../../evil", "notes.txt", "a/context.json"]
)
def test_other_names_are_refused_and_nothing_is_written(text_model, saved, tmp_path, name):
    path = packed(tmp_path / "book.zip", [*members(saved).items(), (name, b"{}")])
    with pytest.raises(ValueError, match=r"'book.zip' holds .*choose a file that this page has saved"):
        unpack_context(path, text_model.model)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_name_that_comes_twice_is_refused(text_model, saved, tmp_path):
    path = packed(tmp_path / "book.zip", [*members(saved).items(), ("context.json", b"{}")])
    with pytest.raises(ValueError, match="one file twice"):
        unpack_context(path, text_model.model)


def test_what_unpacks_to_too_much_is_refused(text_model, saved, tmp_path):
    bomb = packed(tmp_path / "bomb.zip", [*list(members(saved).items())[:2], ("documents.json", b"0" * 10**7)])
    assert bomb.stat().st_size < 10**6
    with pytest.raises(ValueError, match=r"bytes, more than the 5,000,000 that are read here"):
        unpack_context(bomb, text_model.model, largest=5_000_000)


def test_an_unusual_compression_is_refused(text_model, saved, tmp_path):
    path = packed(tmp_path / "book.zip", members(saved).items(), zipfile.ZIP_LZMA)
    with pytest.raises(ValueError, match="packed in a way that is not read here"):
        unpack_context(path, text_model.model)


@pytest.mark.parametrize("left_out", sorted(FILES - {"documents.json"}))
def test_a_missing_file_is_named(text_model, saved, tmp_path, left_out):
    entries = [(name, data) for name, data in members(saved).items() if name != left_out]
    with pytest.raises(ValueError, match=f"{left_out} is missing"):
        unpack_context(packed(tmp_path / "book.zip", entries), text_model.model)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("harm", ["cut", "changed"])
def test_damage_is_found(text_model, saved, tmp_path, place, harm):
    at = int(len(saved) * place)
    data = saved[:at] if harm == "cut" else saved[:at] + bytes(b ^ 255 for b in saved[at : at + 8]) + saved[at + 8 :]
    path = tmp_path / "book.zip"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"'book\.zip'"):
        unpack_context(path, text_model.model)


@pytest.mark.parametrize("data", [b"", b"PK\x03\x04", b"once upon a time " * 100])
def test_what_is_no_archive_is_refused(text_model, tmp_path, data):
    path = tmp_path / "story.zip"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"'story\.zip' is no learned context.*choose a file that this page has saved"):
        unpack_context(path, text_model.model)


def test_a_forged_description_is_refused(text_model, saved, tmp_path):
    entries = members(saved)
    forged = json.loads(entries["context.json"]) | {"tokens": [10**9]}
    entries["context.json"] = json.dumps(forged).encode()
    with pytest.raises(ValueError, match=r"The learned context in 'book\.zip' is damaged"):
        unpack_context(packed(tmp_path / "book.zip", entries.items()), text_model.model)


@pytest.mark.parametrize("other", ["other weights", "another configuration"])
def test_a_context_of_another_model_says_what_to_do(saved, tmp_path, other):
    model = small_text_model(seed=1) if other == "other weights" else small_text_model(chat_template=False)
    if other == "another configuration":
        model.model.config.inner_learning_rate = 0.01
    path = tmp_path / "book.zip"
    path.write_bytes(saved)
    session = Session(model, ModelQueue())
    session.add_document("tale", BOOK)
    list(session.read_on())
    before = session.context
    with pytest.raises(ValueError, match=rf"read with {other}.*Choose the model that has read it"):
        session.load(path)
    assert session.context is before
