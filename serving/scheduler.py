"""Many requests at once: those that write are rows of one batch, those that read take turns.

    turn:  let waiting prompts in;  write one token of every row;  read one piece of a prompt, or several short ones

Every sequence has a learned context of its own. Once its prompt is read it becomes a row of the batch, and leaves it
with its last token; mini-batches end at different steps for different rows, as the model allows. So an answer is what
`generate` writes for the request alone, up to the rounding of a batched product.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from concurrent.futures import CancelledError
from dataclasses import dataclass, field

import psutil
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from .. import TTTE2ECache, TTTE2EForCausalLM
from ..context import LearnedContext
from ..model_cards.card import sequence_memory
from .metrics import Metrics
from .prefixes import PrefixStore
from .sampling import Sampling

logger = logging.get_logger(__name__)

READ_AT_ONCE = 256  # tokens of a prompt, about, between two tokens of those who write
MOST_ROWS = 32  # by default; more make each one slow
NOTHING = (0, 0)  # a span of positions to learn from


@dataclass(frozen=True)
class Capacity:
    """How much a server holds at once.

    Attributes:
        rows: sequences that are read or written at once. None: as many as fit into half of the memory that is free, at
            most 32.
        prefix_bytes: learned contexts of earlier requests that are kept for later ones.

    Raises:
        ValueError: `rows` is below 1, or `prefix_bytes` negative.
    """

    rows: int | None = None
    prefix_bytes: int = 2**28

    def __post_init__(self):
        if self.rows is not None and self.rows < 1:
            raise ValueError(f"rows={self.rows}: must be at least 1")
        if self.prefix_bytes < 0:
            raise ValueError(f"prefix_bytes={self.prefix_bytes}: must be 0 (nothing is kept) or more")

    def most_rows(self, model: TTTE2EForCausalLM) -> int:
        """Sequences at once."""
        if self.rows is not None:
            return self.rows
        memory = sequence_memory(model.config, model.dtype)
        each = 2 * (memory.fast_weights + memory.window + memory.per_token * model.config.sliding_window)
        return max(1, min(MOST_ROWS, free_bytes(model.device) // (2 * each)))


def free_bytes(device: torch.device) -> int:
    """Memory that is free where a model lies."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available


@dataclass(eq=False)
class Job:
    """One prompt and what becomes of it.

    Args:
        ids: of the prompt, int64 [1, tokens], at least one.
        start: what to go on from; only the job holds it. None begins anew.
        learn_from: as in `generate`.
        sampling: makes the job's [`Sampling`], on the scheduler's thread.
        put: gets every token as it is written.
        end: called once, with None or with what went wrong; `CancelledError` where nobody waits any more.
        gone: whether nobody waits any more.
    """

    ids: torch.Tensor
    start: TTTE2ECache | None
    learn_from: str
    sampling: Callable[[], Sampling]
    put: Callable[[int], None]
    end: Callable[[BaseException | None], None]
    gone: Callable[[], bool]
    arrived: float = field(default_factory=time.monotonic)


class Sequence:
    """A job that is worked on.

    Attributes:
        cache: what it has read, until it is a row of a batch; read: tokens of the prompt in it.
        origin: what it began with.
        span: what is learned from while the prompt is read, as `forward` takes it.
        reused: tokens of the prompt that an earlier request had read.
        next: the token that was chosen last.
    """

    def __init__(self, job: Job, model: TTTE2EForCausalLM, prefixes: PrefixStore):
        self.job, self.sampling, self.next = job, job.sampling(), 0
        self.cache: TTTE2ECache | None = job.start or TTTE2ECache(model.config)
        self.origin: LearnedContext | None = self.cache.context
        begin = self.cache.get_seq_length()
        self.span = {"context": None, "none": NOTHING, "prompt": (begin, begin + job.ids.shape[1])}[job.learn_from]
        job.start, self.read = None, 0
        known = prefixes.longest(self.origin, job.learn_from, job.ids[0])
        if known is not None:
            self.cache, self.read = known.cache.fork(), len(known.ids)
        self.reused = self.read

    @property
    def is_new(self) -> bool:
        """Whether nothing was read before its prompt, and nothing of that."""
        return self.cache is not None and not self.cache.is_initialized


def only_rows(cache: TTTE2ECache, rows: Collection[int]) -> TTTE2ECache:
    """Some rows of a learned context, holding nothing of the others."""
    chosen = cache.fork()
    chosen.batch_select_indices(torch.tensor(rows))
    return TTTE2ECache.joined([chosen])


class Batch:
    """Sequences that write, each a row of one learned context.

    Args:
        span: what they learn from while they write, as `forward` takes it.
    """

    def __init__(self, model: TTTE2EForCausalLM, span: tuple[int, int] | None):
        self.model, self.span = model, span
        self.rows: list[Sequence] = []
        self.cache: TTTE2ECache | None = None

    def join(self, sequence: Sequence) -> None:
        """Make a sequence whose prompt was read the last row."""
        caches = [cache for cache in (self.cache, sequence.cache) if cache is not None]
        self.cache, sequence.cache = TTTE2ECache.joined(caches), None
        self.rows.append(sequence)

    def read_by(self, sequence: Sequence) -> TTTE2ECache:
        """What a row has read, for itself."""
        assert self.cache is not None  # there is one where there are rows
        return only_rows(self.cache, [self.rows.index(sequence)])

    def remove(self, sequences: Collection[Sequence]) -> None:
        """Take rows out."""
        kept = [row for row, sequence in enumerate(self.rows) if sequence not in sequences]
        if len(kept) < len(self.rows):
            self.cache = only_rows(self.cache, kept) if kept else None  # type: ignore[arg-type]  # as above
            self.rows = [self.rows[row] for row in kept]

    def step(self) -> CausalLMOutput:
        """Read the token of every row that was chosen last."""
        ids = torch.tensor([[sequence.next] for sequence in self.rows], device=self.model.device)
        return self.model(ids, cache=self.cache, use_cache=True, logits_to_keep=1, learning_span=self.span)


class Scheduler:
    """Reads and writes on a thread of its own, once it is started.

    Args:
        capacity: sequences beyond it wait, first come, first served.
    """

    def __init__(self, model: TTTE2EForCausalLM, capacity: Capacity, metrics: Metrics):
        self.model, self.metrics = model, metrics
        self.most_rows, self.prefixes = capacity.most_rows(model), PrefixStore(capacity.prefix_bytes)
        size = model.config.mini_batch_size
        self.piece = size * max(1, READ_AT_ONCE // size)
        self.waiting: deque[Job] = deque()
        self.reading: deque[Sequence] = deque()
        self.batches = {learning: Batch(model, None if learning else NOTHING) for learning in (True, False)}
        self._changed = threading.Condition()

    def start(self) -> None:
        """Begin to take turns."""
        threading.Thread(target=self._run, name="scheduler", daemon=True).start()

    def submit(self, job: Job) -> None:
        """Work on a job as soon as there is room. Its `end` is called in any case."""
        with self._changed:
            self.waiting.append(job)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.rows())
            self.turn()

    def rows(self) -> int:
        """Sequences that are read or written."""
        return len(self.reading) + sum(len(batch.rows) for batch in self.batches.values())

    @torch.no_grad()
    def turn(self) -> None:
        """Let in who waits, write a token of each row, and read one piece."""
        self._drop_gone()
        while self.waiting and self.rows() < self.most_rows:
            self._let_in(self.waiting.popleft())
        for batch in self.batches.values():
            if batch.rows:
                self._write(batch)
        if self.reading:
            first, *others = self._next_to_read()
            if others:
                self._read_together([first, *others])
            else:
                self._read(first)
        self.metrics.requests_waiting.set(len(self.waiting))
        self.metrics.rows_reading.set(len(self.reading))
        self.metrics.rows_writing.set(self.rows() - len(self.reading))
        self.metrics.prefix_bytes.set(self.prefixes.nbytes)

    def _drop_gone(self) -> None:
        for sequence in [sequence for sequence in self.reading if sequence.job.gone()]:
            self.reading.remove(sequence)
            self._end(sequence.job, CancelledError())
        for batch in self.batches.values():
            gone = [sequence for sequence in batch.rows if sequence.job.gone()]
            batch.remove(gone)
            for sequence in gone:
                self._end(sequence.job, CancelledError())

    def _let_in(self, job: Job) -> None:
        try:
            if job.gone():
                raise CancelledError
            sequence = Sequence(job, self.model, self.prefixes)
        except Exception as error:
            self._end(job, error)
            return
        self.metrics.reused_tokens.inc(sequence.reused)
        self.reading.append(sequence)

    def _next_to_read(self) -> list[Sequence]:
        """The sequence whose turn it is; where its prompt is new and short, with others alike that fit into a piece."""
        group = [self.reading.popleft()]
        if group[0].is_new:
            for other in list(self.reading):
                longest = max(sequence.job.ids.shape[1] for sequence in (*group, other))
                fits = (len(group) + 1) * longest <= self.piece
                if fits and other.is_new and other.span == group[0].span:
                    self.reading.remove(other)
                    group.append(other)
        return group

    def _read(self, sequence: Sequence) -> None:
        """One piece of a prompt."""
        job, begin = sequence.job, sequence.read
        before = sequence.cache.fork() if begin > sequence.reused else None
        try:
            output = self.model(
                job.ids[:, begin : begin + self.piece],
                cache=sequence.cache,
                use_cache=True,
                logits_to_keep=1,
                learning_span=sequence.span,
            )
            sequence.read = min(begin + self.piece, job.ids.shape[1])
            self.metrics.prompt_tokens.inc(sequence.read - begin)
            self._count_steps(output)
            if sequence.read < job.ids.shape[1]:
                self.reading.append(sequence)
                return
            if before is not None:  # where another prompt may begin to differ
                self.prefixes.keep(sequence.origin, job.learn_from, job.ids[0, :begin], before)
            self._begin_to_write(sequence, output.logits[:, -1])
        except Exception as error:
            self._end(job, error)

    def _read_together(self, group: list[Sequence]) -> None:
        """Whole new prompts, as rows that are padded on the left."""
        cache, rows = TTTE2ECache(self.model.config), [sequence.job.ids[0] for sequence in group]
        try:
            output = self.model(
                pad_sequence(rows, batch_first=True, padding_side="left"),
                attention_mask=pad_sequence(list(map(torch.ones_like, rows)), batch_first=True, padding_side="left"),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
                learning_span=group[0].span,
            )
        except Exception:  # whoever it comes from: the others get their answers
            for sequence in group:
                self._read(sequence)
            return
        self._count_steps(output)
        self.metrics.prompt_tokens.inc(sum(map(len, rows)))
        for row, sequence in enumerate(group):
            try:
                sequence.cache, sequence.read = only_rows(cache, [row]), len(rows[row])
                sequence.cache.columns = sequence.read  # without the padding
                self._begin_to_write(sequence, output.logits[row : row + 1, -1])
            except Exception as error:
                self._end(sequence.job, error)

    def _begin_to_write(self, sequence: Sequence, logits: torch.Tensor) -> None:
        """Choose the first token behind a prompt, and make the sequence a row of a batch.

        Args:
            logits: [1, vocabulary], behind the prompt.
        """
        job = sequence.job
        assert sequence.cache is not None  # until it is a row
        self.prefixes.keep(sequence.origin, job.learn_from, job.ids[0], sequence.cache.fork())
        self.metrics.first_token.observe(time.monotonic() - job.arrived)
        if self._choose(sequence, logits):
            self._end(job, None)
        else:
            self.batches[job.learn_from == "context"].join(sequence)

    def _write(self, batch: Batch) -> None:
        """One token of every row."""
        try:
            output = batch.step()
        except Exception as error:  # of all of them: none can go on from a half-changed context
            rows = list(batch.rows)
            batch.remove(rows)
            for sequence in rows:
                self._end(sequence.job, error)
            return
        self._count_steps(output)
        ended = {}
        for row, sequence in enumerate(batch.rows):
            try:
                if self._choose(sequence, output.logits[row, -1:]):
                    ended[sequence] = None
            except Exception as error:
                ended[sequence] = error
        for sequence, error in ended.items():
            if error is None and self.prefixes.most_bytes:
                job, read = sequence.job, sequence.sampling.ids[0, :-1]
                self.prefixes.keep(sequence.origin, job.learn_from, read, batch.read_by(sequence))
        batch.remove(ended)
        for sequence, error in ended.items():
            self._end(sequence.job, error)

    def _choose(self, sequence: Sequence, logits: torch.Tensor) -> bool:
        """Choose a row's next token from logits [1, vocabulary]; returns whether it is the last one."""
        sequence.next, is_last = sequence.sampling.choose(logits)
        self.metrics.generation_tokens.inc()
        sequence.job.put(sequence.next)
        return is_last

    def _count_steps(self, output: CausalLMOutput) -> None:
        losses = getattr(output, "inner_loss", None)
        if losses is not None:
            self.metrics.inner_steps.inc(int(losses.isfinite().sum()))

    def _end(self, job: Job, error: BaseException | None) -> None:
        if error is not None:
            if not isinstance(error, CancelledError | ValueError):  # what no request asks for
                logger.error("A request failed", exc_info=error)
            # Frames hold learned contexts, those of what the error came from as well.
            error.__traceback__ = error.__cause__ = error.__context__ = None
        gone = isinstance(error, CancelledError)
        self.metrics.requests_finished.labels("done" if error is None else "gone" if gone else "failed").inc()
        job.end(error)
