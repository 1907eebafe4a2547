"""Visitors share models and nothing else; everybody's turn comes."""

import threading
import time

import pytest

from ttt_e2e.app import ModelQueue, ModelShelf, Session, Sessions

from ..serving.small import BOOK, same, small_text_model


@pytest.fixture(scope="module")
def text_model():
    return small_text_model()


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr("ttt_e2e.app.session.PIECE_TOKENS", 48)


def read_all(session, text):
    session.add_document("book", text)
    for _ in session.read_on():
        pass


def test_two_sessions_do_not_mix(text_model):
    texts = (BOOK * 3, BOOK[::-1] * 3)
    alone = [Session(text_model, ModelQueue()) for _ in texts]
    for session, text in zip(alone, texts, strict=True):
        read_all(session, text)
    queue = ModelQueue()
    together = [Session(text_model, queue) for _ in texts]
    threads = [threading.Thread(target=read_all, args=pair) for pair in zip(together, texts, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(alone, together, strict=True):
        assert same(one.context.cache, other.context.cache)
    assert not same(together[0].context.cache, together[1].context.cache)


def test_a_short_text_is_read_while_a_long_one_is(text_model):
    queue = ModelQueue()
    long, short = Session(text_model, queue), Session(text_model, queue)
    thread = threading.Thread(target=read_all, args=(long, BOOK * 300))
    thread.start()
    while not long.context.tokens:
        time.sleep(0.01)
    read_all(short, BOOK)
    assert long.progress().is_reading
    assert list(short.ask("why?", True, max_new_tokens=4, temperature=0))
    assert long.progress().is_reading
    long.close()
    thread.join()


def test_turns_come_in_the_order_of_asking():
    queue, order = ModelQueue(), []

    def work(name):
        with queue.turn():
            order.append(name)

    threads = []
    with queue.turn():
        for name in range(5):
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while queue.length < name + 2:
                time.sleep(0.001)
        queue.let_others_go_first()
        order.append("first again")
    for thread in threads:
        thread.join()
    assert order == [0, 1, 2, 3, 4, "first again"]


def test_a_turn_ends_with_an_error():
    queue = ModelQueue()
    with pytest.raises(RuntimeError), queue.turn():
        raise RuntimeError
    with queue.turn():
        assert queue.length == 1


def test_visitors_are_counted_and_dropped(text_model):
    sessions = Sessions(most=2)

    def new():
        return Session(text_model, ModelQueue())

    first, second = sessions.of("a", new), sessions.of("b", new)
    assert sessions.of("a", new) is first and first is not second
    with pytest.raises(ValueError, match="2 visitors already"):
        sessions.of("c", new)
    sessions.drop("a")
    sessions.drop("nobody")
    assert first.is_closed and sessions.find("a") is None and len(sessions) == 1
    other = new()
    sessions.replace("b", other)
    assert sessions.find("b") is other and second.is_closed


def test_who_does_nothing_for_long_makes_room_for_others(text_model):
    sessions = Sessions(most=2, patience=3600)

    def new():
        return Session(text_model, ModelQueue())

    reading, idle = sessions.of("reading", new), sessions.of("idle", new)
    reading.add_document("book", BOOK)
    pieces = reading.read_on()
    next(pieces)
    with pytest.raises(ValueError, match="2 visitors already"):
        sessions.of("new", new)
    reading.last_used -= 9999
    idle.last_used -= 3700
    sessions.of("new", new)
    assert idle.is_closed and sessions.find("idle") is None and sessions.find("reading") is reading
    pieces.close()


def test_models_are_loaded_once_and_when_they_are_wanted(text_model):
    loaded = []

    def load():
        loaded.append("tiny")
        return text_model

    shelf = ModelShelf({"tiny": load, "other": load})
    assert shelf.names == ["tiny", "other"] and not loaded
    assert shelf.get("tiny") is shelf.get("tiny") is text_model and loaded == ["tiny"]
    begun, may_end = threading.Event(), threading.Event()

    def load_slowly():
        begun.set()
        may_end.wait()
        return text_model

    shelf.loaders["slow"] = load_slowly
    thread = threading.Thread(target=shelf.get, args=("slow",))
    thread.start()
    begun.wait()
    assert shelf.get("tiny") is text_model  # while another one is loaded
    may_end.set()
    thread.join()
    with pytest.raises(ValueError, match="'huge': there is no such model; there are tiny, other"):
        shelf.get("huge")
    with pytest.raises(ValueError, match="name one with --model"):
        ModelShelf({})
