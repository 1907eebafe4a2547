"""What a visitor does, without a browser: read, pause, ask, save, load, compare."""

import dataclasses
import zipfile

import numpy as np
import pytest
import torch

from ttt_e2e.app import Limits, LossCurve, ModelQueue, Session, pack_context, unpack_context
from ttt_e2e.serving import Conversation, StoredContext, open_context, read_documents, text_tokens, write_context

from ..serving.small import BOOK, GREEDY, files, same, small_text_model

LONG, PIECE = BOOK * 3, 48  # more than four pieces
GREEDILY = {"max_new_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def text_model():
    """In float64: other pieces round differently, and learning makes more of that with every step."""
    text_model = small_text_model()
    return dataclasses.replace(text_model, model=text_model.model.double())


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr("ttt_e2e.app.session.PIECE_TOKENS", PIECE)


@pytest.fixture
def session(text_model):
    return Session(text_model, ModelQueue())


def read(session, text=LONG, name="book"):
    """Read a document to its end; returns all that is shown meanwhile."""
    session.add_document(name, text)
    return list(session.read_on())


def at_once(text_model, *texts):
    """The context after documents as `ttt-e2e read` reads them."""
    documents = [("book", text_tokens(text, text_model.tokenizer, True)) for text in texts]
    return read_documents(text_model, StoredContext.new(text_model.model), documents)


def close(one, other, tolerance=1e-9):
    """Whether two contexts have learned the same, but for rounding."""
    pairs = zip(one.cache.context.fast.tensors, other.cache.context.fast.tensors, strict=True)
    apart = max((left - right).abs().max().item() for left, right in pairs)
    return one.tokens == other.tokens and apart < tolerance


def test_reading_in_pieces_equals_reading_in_one_go(text_model, session):
    shown = read(session)
    assert len(shown) > 3 and [progress.read for progress in shown[:2]] == [PIECE, 2 * PIECE]
    whole = at_once(text_model, LONG)
    assert close(session.context, whole) and session.context.documents == whole.documents


def test_another_document_goes_into_the_same_context(text_model, session):
    read(session)
    read(session, BOOK[::-1])
    whole = at_once(text_model, LONG, BOOK[::-1])
    assert close(session.context, whole) and session.context.documents == whole.documents
    assert not close(session.context, at_once(text_model, BOOK[::-1]))


def test_losses_are_those_of_the_whole_text_with_learning_and_without(text_model, session):
    progress = read(session)[-1]
    ids = text_tokens(LONG, text_model.tokenizer, True)[None]
    for curve, learning in ((progress.learning, True), (progress.plain, False)):
        with torch.no_grad():
            output = text_model.model(ids, labels=ids, use_cache=False, test_time_training=learning)
        losses = output.token_nll[0]
        assert curve.count == len(losses) and curve.mean == pytest.approx(losses.mean().item(), abs=1e-9)
        middle, loss = curve.points()[1]
        assert middle == 1.5 * curve.width
        assert loss == pytest.approx(losses[curve.width : 2 * curve.width].mean().item(), abs=1e-9)
    assert progress.learning.mean < progress.plain.mean - 0.1


def test_what_is_kept_stays_the_same_and_full_attention_would_grow(session):
    shown = read(session)
    whole_pieces = {progress.kept for progress in shown[1:-1]}
    assert len(shown) > 4 and len(whole_pieces) == 1
    # Behind the last one fewer tokens wait for the rest of their mini-batch.
    assert shown[-1].kept == session.context.cache.nbytes <= max(whole_pieces)
    assert shown[-1].full == pytest.approx(shown[1].full * shown[-1].tokens / shown[1].tokens)


def test_a_pause_changes_nothing(text_model, session):
    session.add_document("book", LONG)
    reading = session.read_on()
    next(reading)
    session.stop()
    assert list(reading) == []
    progress = session.progress()
    assert progress.is_reading and progress.read == session.context.tokens == PIECE
    with pytest.raises(ValueError, match="book is not read to its end"):
        session.add_document("tale", BOOK)
    assert not list(session.read_on())[-1].is_reading
    whole = at_once(text_model, LONG)
    assert close(session.context, whole) and session.context.documents == whole.documents


def test_only_one_thing_happens_at_a_time(session):
    session.add_document("book", LONG)
    reading = session.read_on()
    next(reading)
    for other in (session.forget, lambda: next(session.ask("why?", True)), lambda: next(session.read_on())):
        with pytest.raises(ValueError, match="still reading or writing"):
            other()
    reading.close()
    session.forget()
    assert session.progress().tokens == 0


def test_an_answer_is_that_of_a_conversation_and_is_learned_if_wanted(text_model, session):
    read(session)
    start = session.context
    for learn, learn_from in ((True, "context"), (False, "none")):
        expected = Conversation(text_model, start, **GREEDY | {"max_new_tokens": 8}, learn_from=learn_from)
        answer = expected.answer("where does the water go?")
        session.context = start
        texts = list(session.ask("where does the water go?", learn, **GREEDILY))
        assert texts[-1] == answer.text and len(texts) > 2 and answer.text.startswith(texts[0])
        assert same(session.context.cache, expected.context.cache)
        assert same(start.cache, session.context.cache) is False


def test_writing_on_follows_the_text_and_the_next_document_follows_what_was_written(text_model, session):
    read(session)
    before = session.context.tokens
    written = list(session.go_on_writing("the old river", True, **GREEDILY))[-1]
    count = session.context.tokens - before
    assert written and session.context.documents[-1].tokens == count
    progress = read(session, BOOK, "tale")[-1]
    assert progress.tokens == before + count + progress.length
    # The reading without learning has seen all of it, too.
    assert session._plain.context.tokens[0] == progress.tokens and session._plain.context.fast is None


def test_an_answer_ends_where_nobody_takes_it(session):
    read(session, BOOK)
    answer = session.ask("why?", True, max_new_tokens=1000, temperature=0)
    next(answer)
    answer.close()
    assert session.context.documents[-1].tokens < 1000
    assert list(session.ask("and now?", True, **GREEDILY))


def test_saved_equals_kept(text_model, session, tmp_path):
    read(session)
    session.save(tmp_path / "book.zip")
    other = Session(text_model, ModelQueue())
    other.load(tmp_path / "book.zip")
    assert same(other.context.cache, session.context.cache)
    assert other.context.documents == session.context.documents
    assert other.progress().learning.start == session.context.tokens
    for one in (session, other):
        read(one, BOOK, "tale")
    assert same(other.context.cache, session.context.cache)


def test_a_saved_file_is_the_folder_that_read_writes(text_model, session, tmp_path):
    read(session)
    session.save(tmp_path / "book.zip")
    write_context(tmp_path / "book", session.context)
    with zipfile.ZipFile(tmp_path / "book.zip") as archive:
        archive.extractall(tmp_path / "unpacked")
    assert files(tmp_path / "unpacked") == files(tmp_path / "book")
    assert open_context(tmp_path / "unpacked", text_model.model).tokens == session.context.tokens
    pack_context(unpack_context(tmp_path / "book.zip", text_model.model), tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == (tmp_path / "book.zip").read_bytes()


def test_nothing_cannot_be_saved(session, tmp_path):
    with pytest.raises(ValueError, match="Nothing has been read yet"):
        session.save(tmp_path / "nothing.zip")
    assert not list(tmp_path.iterdir())


def test_two_contexts_are_compared(text_model, session, tmp_path):
    read(session)
    session.save(tmp_path / "book.zip")
    _, same_one = session.compare(tmp_path / "book.zip")
    assert same_one.cosine == pytest.approx(1) and same_one.losses is None
    other = Session(text_model, ModelQueue())
    read(other, BOOK[::-1], "tale")
    loaded, found = other.compare(tmp_path / "book.zip", BOOK)
    assert loaded.documents == session.context.documents and found.cosine < 0.99
    nothing, own, stored = found.losses
    assert stored < nothing and stored < own  # it has read the passage
    assert other.context.documents[-1].name == "tale"


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_document_is_refused(session, text):
    with pytest.raises(ValueError, match="nothing to read"):
        session.add_document("nothing", text)


def test_limits(text_model):
    session = Session(text_model, ModelQueue(), Limits(document=100, message=10, new_tokens=5))
    with pytest.raises(ValueError, match="101 characters, but 100"):
        session.add_document("book", "x" * 101)
    session.add_document("book", "x" * 100)
    for begin in (session.ask, session.go_on_writing):
        with pytest.raises(ValueError, match="11 characters, but 10"):
            next(begin("x" * 11, True))
        with pytest.raises(ValueError, match="6; choose from 1 to 5"):
            next(begin("x", True, max_new_tokens=6))
        with pytest.raises(ValueError, match="type something"):
            next(begin(" ", True))


def test_a_closed_session_reads_no_further(session):
    session.add_document("book", LONG)
    reading = session.read_on()
    next(reading)
    session.close()
    assert list(reading) == [] and session.context.tokens == PIECE
    with pytest.raises(ValueError, match="has ended"):
        next(session.read_on())


def test_a_curve_keeps_its_size_and_its_means():
    losses = np.random.default_rng(0).uniform(0, 5, 5000)
    losses[[0, 77]] = np.nan
    curve = LossCurve(start=300, width=8)
    for piece in np.split(losses, [3, 1000, 1001, 4500]):
        curve.add(piece)
    assert curve.length == 5000 and curve.count == 4998 and curve.mean == pytest.approx(np.nanmean(losses))
    points = curve.points()
    assert curve.width == 128 and len(points) == 39
    for index, (middle, loss) in enumerate(points):
        own = losses[128 * index : 128 * index + 128]
        assert middle == 300 + 128 * index + 64 and loss == pytest.approx(np.nanmean(own))
