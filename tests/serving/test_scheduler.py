"""Requests that share the model's steps: each gets what `generate` writes for it alone, whoever comes and goes."""

from concurrent.futures import CancelledError

import pytest
import torch
from transformers import GenerationConfig, set_seed

from ttt_e2e import TTTE2ECache

from ..modeling.helpers import BATCH, random_ids
from .small import small_text_model

pytest.importorskip("prometheus_client", reason="needs the extra serve")

from ttt_e2e.serving import scheduler as scheduling
from ttt_e2e.serving.metrics import Metrics
from ttt_e2e.serving.sampling import Sampling
from ttt_e2e.serving.scheduler import Capacity, Job, Scheduler

PIECE = 4 * BATCH  # of a prompt, read in one turn
LENGTHS = (3, 2 * BATCH, 40, 1, PIECE + 5 * BATCH + 3, 19)
WRITTEN = (20, 9, 1, 25, 11, 2 * BATCH)


@pytest.fixture(scope="module")
def text_model():
    """In float64, where a batch's rounding decides nothing."""
    made = small_text_model()
    made.model.double()
    return made


@pytest.fixture
def scheduler(text_model):
    return scheduler_of(text_model)


def scheduler_of(text_model, **capacity):
    """One that takes turns when it is told to."""
    made = Scheduler(text_model.model, Capacity(**{"rows": 8} | capacity), Metrics())
    made.piece = PIECE
    return made


class Client:
    """A request and what it has got."""

    def __init__(self, text_model, ids, tokens, learn_from="context", start=None, seed=None, **options):
        self.text_model, self.ids, self.learn_from, self.start, self.seed = text_model, ids, learn_from, start, seed
        self.config = GenerationConfig(max_new_tokens=tokens, pad_token_id=0, do_sample=seed is not None, **options)
        self.written, self.ends, self.left = [], [], False

    def job(self, put=None):
        return Job(
            ids=self.ids,
            start=None if self.start is None else self.start.fork(),
            learn_from=self.learn_from,
            sampling=self.sampling,
            put=put or self.written.append,
            end=self.ends.append,
            gone=lambda: self.left,
        )

    def sampling(self):
        return Sampling(self.text_model.model, self.ids, self.config, self.text_model.tokenizer, self.seed)

    def alone(self):
        """What `generate` writes."""
        cache = TTTE2ECache(self.text_model.model.config) if self.start is None else self.start.fork()
        if self.seed is not None:
            set_seed(self.seed)
        mask = torch.ones(1, cache.get_seq_length() + self.ids.shape[1])
        written = self.text_model.model.generate(
            self.ids, attention_mask=mask, cache=cache, generation_config=self.config, learn_from=self.learn_from
        )
        return written[0, self.ids.shape[1] :].tolist()


def clients(text_model, **options):
    pairs = zip(LENGTHS, WRITTEN, strict=True)
    return [Client(text_model, random_ids(1, length, seed=length), tokens, **options) for length, tokens in pairs]


def work(scheduler):
    """Turns until nothing is left to do."""
    turns = 0
    while scheduler.waiting or scheduler.rows():
        scheduler.turn()
        turns += 1
    return turns


def value(scheduler, name, **labels):
    return scheduler.metrics.registry.get_sample_value(f"ttt_e2e_{name}", labels or None)


@pytest.mark.parametrize(
    ("learn_from", "rows"), [("context", 1), ("context", 3), ("context", 8), ("prompt", 3), ("none", 8)]
)
def test_everyone_gets_what_generate_writes(text_model, learn_from, rows):
    asking = clients(text_model, learn_from=learn_from)
    scheduler = scheduler_of(text_model, rows=rows)
    for client in asking[:4]:
        scheduler.submit(client.job())
    for _ in range(5):
        scheduler.turn()
    for client in asking[4:]:  # come while others write
        scheduler.submit(client.job())
    work(scheduler)
    assert [client.written for client in asking] == [client.alone() for client in asking]
    assert [client.ends for client in asking] == [[None]] * len(asking)


def test_learning_or_not_from_different_contexts_side_by_side(text_model, scheduler):
    model, cache = text_model.model, TTTE2ECache(text_model.model.config)
    with torch.no_grad():
        model(random_ids(1, 5 * BATCH + 3, seed=9), cache=cache)
    kinds = [
        ("context", cache),
        ("prompt", None),
        ("none", cache),
        ("context", None),
        ("prompt", cache),
        ("none", None),
    ]
    pairs = zip(kinds, LENGTHS, strict=True)
    asking = [
        Client(text_model, random_ids(1, length, seed=length), 2 * BATCH + 1, learn_from, start)
        for (learn_from, start), length in pairs
    ]
    for client in asking:
        scheduler.submit(client.job())
    work(scheduler)
    assert [client.written for client in asking] == [client.alone() for client in asking]


def test_draws_are_those_of_generate_with_the_seed(text_model, scheduler):
    asking = clients(text_model, seed=5, temperature=1.3, top_k=0, repetition_penalty=1.2)
    for client in asking:
        scheduler.submit(client.job())
    work(scheduler)
    assert [client.written for client in asking] == [client.alone() for client in asking]


def test_a_text_ends_with_its_end_token_or_stop_string(text_model, scheduler):
    long = Client(text_model, random_ids(1, 9), 60)
    written = long.alone()
    ending = Client(text_model, random_ids(1, 9), 60, eos_token_id=written[20])
    stop = next(letter for letter in text_model.tokenizer.decode(written) if letter.isascii())
    stopping = Client(text_model, random_ids(1, 9), 60, stop_strings=[stop])
    for client in (long, ending, stopping):
        scheduler.submit(client.job())
    work(scheduler)
    assert ending.written == written[: written.index(written[20]) + 1]
    assert stopping.written == written[: len(stopping.written)] and len(stopping.written) < len(written)
    assert text_model.tokenizer.decode(stopping.written).endswith(stop) and long.written == written


def test_a_short_prompt_does_not_wait_for_a_long_one_to_be_read(text_model, scheduler):
    long = Client(text_model, random_ids(1, 20 * PIECE), 2)
    scheduler.submit(long.job())
    scheduler.turn()
    short = Client(text_model, random_ids(1, 5), 12)
    scheduler.submit(short.job())
    scheduler.turn(), scheduler.turn()
    assert len(short.written) == 1
    for _ in range(11):
        scheduler.turn()
    assert short.ends == [None] and not long.written and scheduler.reading


def test_new_short_prompts_are_read_together(text_model, scheduler):
    """As many as make a piece: padded to the longest, 4 of BATCH tokens here."""
    asking = [Client(text_model, random_ids(1, BATCH - number % 3, seed=number), 9) for number in range(6)]
    learning = Client(text_model, random_ids(1, BATCH, seed=9), 9, "none")
    for client in (*asking[:2], learning, *asking[2:]):
        scheduler.submit(client.job())
    scheduler.turn()
    assert [len(client.written) for client in asking] == [1, 1, 1, 1, 0, 0] and not learning.written
    work(scheduler)
    for client in (*asking, learning):
        assert client.written == client.alone()
    assert value(scheduler, "prompt_tokens_total") == sum(client.ids.shape[1] for client in (*asking, learning))
    assert value(scheduler, "time_to_first_token_seconds_count") == 7


def test_prompts_that_cannot_be_read_together_are_read_one_by_one(text_model, scheduler, monkeypatch):
    asking = [Client(text_model, random_ids(1, 5, seed=seed), 7) for seed in range(3)]
    for client in asking:
        scheduler.submit(client.job())
    forward = type(text_model.model).forward

    def of_one(self, ids, **options):
        return forward(self, ids, **options) if len(ids) == 1 else 1 / 0

    with monkeypatch.context() as broken:
        broken.setattr(type(text_model.model), "forward", of_one)
        scheduler.turn()
    work(scheduler)
    assert [client.written for client in asking] == [client.alone() for client in asking]


def test_what_fails_behind_a_prompt_that_was_read_with_others_ends_its_request_alone(
    text_model, scheduler, monkeypatch
):
    """As where no memory is left for the copy of a row."""
    asking = [Client(text_model, random_ids(1, 5, seed=seed), 7) for seed in range(3)]
    for client in asking:
        scheduler.submit(client.job())
    copy_rows = scheduling.only_rows

    def without_the_second(cache, rows):
        return copy_rows(cache, rows) if list(rows) != [1] else 1 / 0

    with monkeypatch.context() as broken:
        broken.setattr(scheduling, "only_rows", without_the_second)
        scheduler.turn()
    work(scheduler)
    first, failed, last = asking
    assert [client.written for client in (first, last)] == [client.alone() for client in (first, last)]
    assert not failed.written and [type(end) for end in failed.ends] == [ZeroDivisionError]
    assert first.ends == last.ends == [None]


def test_those_who_find_no_room_wait_in_their_order(text_model):
    scheduler, order = scheduler_of(text_model, rows=2), []
    for client in [Client(text_model, random_ids(1, 4, seed=seed), 3) for seed in range(5)]:
        scheduler.submit(client.job(put=lambda token, client=client: order.append(client)))
    scheduler.turn()
    assert len(scheduler.waiting) == 3 and value(scheduler, "requests_waiting") == 3
    work(scheduler)
    first = list(dict.fromkeys(order))
    assert len(order) == 15 and [client.ids.tolist() for client in first] == [
        random_ids(1, 4, seed=seed).tolist() for seed in range(5)
    ]


@pytest.mark.parametrize("turns", [0, 1, 4])
def test_one_who_leaves_is_dropped_at_the_next_step(text_model, scheduler, turns):
    """While it waits, while its prompt is read, while others and it write."""
    leaving, staying = Client(text_model, random_ids(1, 2 * PIECE, seed=1), 50), clients(text_model)[0]
    scheduler.submit(staying.job())
    scheduler.submit(leaving.job())
    for _ in range(turns):
        scheduler.turn()
    leaving.left = True
    scheduler.turn()
    assert len(leaving.ends) == 1 and isinstance(leaving.ends[0], CancelledError)
    work(scheduler)
    assert staying.written == staying.alone() and value(scheduler, "requests_finished_total", reason="gone") == 1


def test_what_goes_wrong_for_one_is_told_to_it_alone(text_model, scheduler):
    def fails(token):
        raise OSError("no way to the client")

    refused = Client(text_model, random_ids(1, 5), 5, num_beams=2)
    forbidden = Client(text_model, random_ids(1, 5), 5, suppress_tokens=list(range(300)))
    broken, fine = Client(text_model, random_ids(1, 5), 20), clients(text_model)[1]
    refused.sampling = lambda: 1 / 0
    scheduler.submit(refused.job())
    scheduler.submit(forbidden.job())
    scheduler.submit(fine.job())
    scheduler.submit(
        broken.job(put=lambda token: broken.written.append(token) or (len(broken.written) > 3 and fails(token)))
    )
    work(scheduler)
    assert isinstance(refused.ends[0], ZeroDivisionError) and "every token is forbidden" in str(forbidden.ends[0])
    assert isinstance(broken.ends[0], OSError) and len(broken.written) == 4
    assert fine.written == fine.alone() and value(scheduler, "requests_finished_total", reason="failed") == 3


def test_a_step_that_fails_ends_its_rows_and_nothing_else(text_model, scheduler, monkeypatch):
    asking = [Client(text_model, random_ids(1, 5, seed=seed), 20) for seed in range(2)]
    for client in asking:
        scheduler.submit(client.job())
    for _ in range(4):
        scheduler.turn()
    with monkeypatch.context() as broken:
        broken.setattr(type(text_model.model), "forward", lambda *arguments, **options: 1 / 0)
        scheduler.turn()
    assert [type(client.ends[0]) for client in asking] == [ZeroDivisionError] * 2 and not scheduler.rows()
    later = clients(text_model)[0]
    scheduler.submit(later.job())
    work(scheduler)
    assert later.written == later.alone()


def test_what_an_earlier_request_read_is_not_read_again(text_model, scheduler):
    first = Client(text_model, random_ids(1, 3 * PIECE + 7, seed=1), 20)
    scheduler.submit(first.job())
    work(scheduler)
    before = value(scheduler, "prompt_tokens_total")
    assert before == first.ids.shape[1]
    answer = torch.tensor([first.written])
    conversation = torch.cat([first.ids, answer, random_ids(1, 9, seed=2)], dim=1)
    differing = torch.cat([first.ids[:, :-3], random_ids(1, 9, seed=3)], dim=1)
    for ids, reused in (
        (conversation, conversation.shape[1] - 10),
        (first.ids, 3 * PIECE),
        (differing, 3 * PIECE),
    ):
        read, known = value(scheduler, "prompt_tokens_total"), value(scheduler, "reused_tokens_total")
        again = Client(text_model, ids, 20)
        scheduler.submit(again.job())
        work(scheduler)
        assert again.written == again.alone()
        assert value(scheduler, "reused_tokens_total") - known == reused
        assert value(scheduler, "prompt_tokens_total") - read == ids.shape[1] - reused


@pytest.mark.parametrize("learn_from", ["context", "none"])
def test_a_conversation_goes_on_from_what_was_written_beside_a_longer_one(text_model, scheduler, learn_from):
    short = Client(text_model, random_ids(1, 7, seed=1), 5, learn_from)
    long = Client(text_model, random_ids(1, 2 * PIECE, seed=2), 2, learn_from)
    scheduler.submit(long.job())
    scheduler.submit(short.job())
    work(scheduler)
    conversation = torch.cat([short.ids, torch.tensor([short.written]), random_ids(1, 3 * BATCH, seed=3)], dim=1)
    further = Client(text_model, conversation, 2 * BATCH, learn_from)
    scheduler.submit(further.job())
    work(scheduler)
    assert value(scheduler, "reused_tokens_total") == 7 + 5 - 1
    assert further.written == further.alone()


def test_beginnings_are_of_their_context_and_way_of_learning(text_model, scheduler):
    model, caches = text_model.model, []
    for seed in range(2):
        caches.append(TTTE2ECache(model.config))
        with torch.no_grad():
            model(random_ids(1, 3 * BATCH, seed=seed), cache=caches[-1])
    ids = random_ids(1, 4 * BATCH, seed=5)
    for start in (None, *caches):
        for learn_from in ("context", "none", "prompt"):
            client = Client(text_model, ids, 6, learn_from, start)
            scheduler.submit(client.job())
            work(scheduler)
            assert client.written == client.alone()
    assert value(scheduler, "reused_tokens_total") == 0


def test_kept_beginnings_stay_below_their_limit(text_model):
    limit = 2_000_000
    scheduler = scheduler_of(text_model, prefix_bytes=limit)
    for seed in range(30):
        scheduler.submit(Client(text_model, random_ids(1, 3 * BATCH, seed=seed), 2).job())
        work(scheduler)
        assert scheduler.prefixes.nbytes <= limit
    assert scheduler.prefixes.nbytes > limit / 4 and value(scheduler, "prefix_bytes") == scheduler.prefixes.nbytes
    nothing = scheduler_of(text_model, prefix_bytes=0)
    for _ in range(2):
        nothing.submit(Client(text_model, random_ids(1, 3 * BATCH), 2).job())
        work(nothing)
    assert nothing.prefixes.nbytes == 0 and value(nothing, "reused_tokens_total") == 0


def test_numbers_are_counted(text_model, scheduler):
    client = Client(text_model, random_ids(1, 2 * BATCH), 2 * BATCH + 2)
    scheduler.submit(client.job())
    work(scheduler)
    assert value(scheduler, "generation_tokens_total") == 2 * BATCH + 2
    assert value(scheduler, "inner_steps_total") == 4  # of 4 * BATCH + 1 tokens that were read
    assert value(scheduler, "time_to_first_token_seconds_count") == 1
    assert value(scheduler, "requests_finished_total", reason="done") == 1


def test_capacity_follows_memory_and_refuses_nonsense(text_model, monkeypatch):
    assert 1 <= Capacity().most_rows(text_model.model) <= 32 and Capacity(rows=5).most_rows(text_model.model) == 5
    monkeypatch.setattr("ttt_e2e.serving.scheduler.free_bytes", lambda device: 10**6)
    few = Capacity().most_rows(text_model.model)
    monkeypatch.setattr("ttt_e2e.serving.scheduler.free_bytes", lambda device: 0)
    assert Capacity().most_rows(text_model.model) == 1 <= few < 32
    with pytest.raises(ValueError, match="rows=0: must be at least 1"):
        Capacity(rows=0)
    with pytest.raises(ValueError, match="prefix_bytes=-1: must be 0"):
        Capacity(prefix_bytes=-1)
