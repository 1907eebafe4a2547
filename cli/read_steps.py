"""What `ttt-e2e read --documents` does: many documents, by one process or by several."""

import os
import sys
import time

import torch
import typer
from tqdm.auto import tqdm

from ttt_e2e.serving import ManyDocuments, ReadingRequest

from .errors import refusals


def read_many(device: str | None, **request) -> None:
    """Read many documents into a context each; the first of several processes says what has become of them.

    Args:
        device: as torch names it; None for the GPU of this process, or the CPU.
        request: the other fields of `ReadingRequest`, without this process's number.

    Raises:
        typer.Exit: 1, where a document could not be read.
    """
    # As torchrun and accelerate launch tell their processes, on all machines, and on this one.
    process, processes, here = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    if device is None and torch.cuda.is_available():
        device = f"cuda:{here}"
    unreadable, read, tokens = 0, 0, 0
    with refusals("Interrupted. The same command goes on with the documents that are left."):
        reading = ManyDocuments(ReadingRequest(**request, device=device, process=process, processes=max(1, processes)))
        groups, count = reading.shared_out(), len(reading.documents)
        left, started = sum(map(len, groups)), time.perf_counter()
        with tqdm(total=count, initial=count - left, desc="Reading", unit=" documents", disable=process > 0) as bar:
            for outcome in reading.read(groups):
                if outcome.error is not None:
                    unreadable += 1
                    if process == 0:  # every process comes to all that cannot be read
                        bar.write(f"Left out: {outcome.error}", file=sys.stderr)
                read, tokens = read + bool(outcome.tokens), tokens + outcome.tokens
                bar.update()
    if process > 0:
        # Nothing more to say; an exit code of its own might make the launcher stop the others in their last document.
        return
    seconds = time.perf_counter() - started
    typer.echo(
        f"{reading.output}: contexts of {count - unreadable:,} documents, {count - left:,} of which were there before. "
        f"This process has read {read:,} documents, {tokens:,} tokens, {tokens / seconds:,.0f} a second."
    )
    if unreadable:
        typer.echo(f"{unreadable:,} documents could not be read, see above; the same command tries again.", err=True)
        raise typer.Exit(1)
