"""Read a library of documents on a cluster, into one learned context each, with Ray Data.

    pip install -e ".[ray]"
    python examples/ray_read.py --model runs/tiny --documents library/ --output contexts --workers 4

Every worker holds the model and is handed numbers of documents. All machines must see documents and output under the
same paths. A context that is there is not read again: Ray starts a worker that has died anew and hands it the same
numbers once more, so that only the document is read twice in which it died. The same holds for the whole command.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import ray

from ttt_e2e.data.named_documents import NamedDocuments
from ttt_e2e.serving import ManyDocuments, Outcome, ReadingRequest

NUMBERS_AT_ONCE = 8  # batches that a worker is handed together


class Reader:
    """A worker: the model, and the documents that it is told to read."""

    def __init__(self, request: ReadingRequest):
        self.reading = ManyDocuments(request)

    def __call__(self, batch: dict) -> dict:
        """From `id`, numbers of documents, to what became of each: `name`, `tokens`, and `error` or ""."""
        outcomes = list(self.reading.read([batch["id"].tolist()]))
        return {
            "name": [outcome.name for outcome in outcomes],
            "tokens": [outcome.tokens for outcome in outcomes],
            "error": [outcome.error or "" for outcome in outcomes],
        }


def read_on_ray(request: ReadingRequest, workers: int, gpus: float = 0, reader: type = Reader) -> Iterator[Outcome]:
    """Read the documents of a request by a pool of workers.

    Args:
        workers: how many, each with a CPU and so many `gpus` of its own.

    Yields:
        What became of each document.
    """
    listed = NamedDocuments(
        request.documents, cache_folder=request.cache, text_column=request.text_column, split=request.split
    )
    count = len(listed)
    blocks = max(1, min(count, max(workers, count // (request.rows * NUMBERS_AT_ONCE))))
    # As tables that are there, so that no task waits for a CPU that the workers hold.
    numbers = [pyarrow.table({"id": part}) for part in np.array_split(np.arange(count), blocks)]
    read = ray.data.from_arrow(numbers).map_batches(
        reader,
        fn_constructor_args=(request,),
        batch_size=request.rows,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=1,
        num_gpus=gpus,
    )
    for row in read.iter_rows():
        yield Outcome(row["name"], row["tokens"], row["error"] or None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a saved model's folder, a run's folder, or an id of the Hub")
    parser.add_argument("--documents", required=True, help="a folder, .jsonl or .parquet files, or a data set's name")
    parser.add_argument("--output", required=True, type=Path, help="gets a folder for each document")
    parser.add_argument("--cache", type=Path, default=Path("~/.cache/ttt-e2e").expanduser(), help="for rows of files")
    parser.add_argument("--rows", type=int, default=1, help="documents that a worker reads side by side")
    parser.add_argument("--dtype", default="auto", help="of the weights: auto (as saved), float32, bfloat16, float16")
    parser.add_argument("--text-column", default="text", help="of rows")
    parser.add_argument("--workers", type=int, default=2, help="processes, each with the model")
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    arguments = vars(parser.parse_args())
    workers, gpus = arguments.pop("workers"), arguments.pop("gpus")
    there, wrong = 0, 0
    for outcome in read_on_ray(ReadingRequest(**arguments), workers, gpus):
        there, wrong = there + (outcome.error is None), wrong + (outcome.error is not None)
        if outcome.error:
            print(f"Left out: {outcome.error}", file=sys.stderr)
    print(f"{arguments['output']}: contexts of {there:,} documents; {wrong:,} could not be read.")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
