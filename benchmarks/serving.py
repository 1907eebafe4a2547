"""How a server does with many clients at once, over HTTP: tokens per second, waiting, memory.

    python -m ttt_e2e.benchmarks.serving --model model_cards/checkpoints/tiny-standard-library

Measured are 8 clients who have 128 tokens written each, one after the other and together; how long a short prompt waits
for its first token while another one of 16,384 tokens is read; and the memory of the process over 500 requests.
"""

import gc
import json
import socket
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import psutil
import requests
import torch
import typer
import uvicorn
from tqdm.auto import tqdm

from ..evaluation.results import environment
from ..serving import ContextFolder, TextModel, load_text_model
from ..serving.scheduler import Capacity
from ..serving.server import build_app
from ..storage.disk import write_text

CLIENTS, WRITTEN, PROMPT = 8, 128, 64
LONG, LONG_WAITS = 16_384, 5
MANY, AT_ONCE, SETTLED = 500, 8, 100
PATIENCE = 3600  # seconds
NAME = "served"


@dataclass(frozen=True)
class ServingFigures:
    """What was measured.

    Attributes:
        one_by_one, together: tokens per second that the clients get; ratio: of the second to the first.
        first_token_seconds: of a short prompt, while another one is read, each time; first_token_alone: while none is.
        memory_growth: bytes of the process after all requests beyond those after the first 100.
        requests: how many those were.
    """

    one_by_one: float
    together: float
    ratio: float
    first_token_seconds: list[float]
    first_token_alone: float
    memory_growth: int
    requests: int


@contextmanager
def served(text_model: TextModel) -> Iterator[str]:
    """A server in this process; gives its address."""
    app = build_app(NAME, text_model, ContextFolder(None, text_model.model), capacity=Capacity(prefix_bytes=0))
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


class Asking:
    """Clients of a server, whose prompts are random ids.

    Args:
        vocabulary: ids lie below it.
        progress: counts the answers.
    """

    def __init__(self, address: str, vocabulary: int, progress: tqdm):
        self.url, self.vocabulary, self.seed = f"{address}/v1/completions", vocabulary, 0
        self.progress = progress

    def body(self, length: int, written: int) -> dict:
        """A request that nobody has made before."""
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        ids = torch.randint(8, self.vocabulary, (length,), generator=generator).tolist()
        config = json.dumps({"max_new_tokens": written, "min_new_tokens": written})
        return {"model": NAME, "prompt": ids, "temperature": 0, "generation_config": config}

    def complete(self, body: dict) -> int:
        """Tokens that were written."""
        answer = requests.post(self.url, json=body, timeout=PATIENCE)
        answer.raise_for_status()
        self.progress.update()
        return answer.json()["usage"]["completion_tokens"]

    def first_token(self, body: dict) -> float:
        """Seconds until the first piece of text came."""
        begin = time.perf_counter()
        with requests.post(self.url, json=body | {"stream": True}, stream=True, timeout=PATIENCE) as answer:
            answer.raise_for_status()
            for line in answer.iter_lines(chunk_size=1):
                if line.startswith(b"data:"):
                    self.progress.update()
                    return time.perf_counter() - begin
        raise RuntimeError("the server wrote nothing")


def rate(asking: Asking, work: Callable[[Callable, list[dict]], object]) -> float:
    """Tokens per second that the clients get."""
    bodies = [asking.body(PROMPT, WRITTEN) for _ in range(CLIENTS)]
    begin = time.perf_counter()
    work(asking.complete, bodies)
    return CLIENTS * WRITTEN / (time.perf_counter() - begin)


def measure_serving(text_model: TextModel) -> ServingFigures:
    """Serve a model, ask, and measure."""
    with (
        served(text_model) as address,
        ThreadPoolExecutor(CLIENTS) as clients,
        tqdm(total=2 * CLIENTS + 2 * LONG_WAITS + 2 + MANY // AT_ONCE * AT_ONCE, unit=" answers") as progress,
    ):
        asking = Asking(address, text_model.model.config.vocab_size, progress)
        asking.complete(asking.body(PROMPT, 4))
        one_by_one = rate(asking, lambda ask, bodies: list(map(ask, bodies)))
        together = rate(asking, lambda ask, bodies: list(clients.map(ask, bodies)))
        alone = statistics.median(asking.first_token(asking.body(PROMPT, 2)) for _ in range(LONG_WAITS))
        long = clients.submit(asking.complete, asking.body(LONG, 1))
        time.sleep(0.5)
        waits = []
        while not long.done() and len(waits) < LONG_WAITS:
            waits.append(asking.first_token(asking.body(PROMPT, 2)))
        long.result()
        process, memory = psutil.Process(), []
        for _ in range(MANY // AT_ONCE):
            list(clients.map(asking.complete, [asking.body(PROMPT, 8) for _ in range(AT_ONCE)]))
            gc.collect()
            memory.append(process.memory_info().rss)
    return ServingFigures(
        one_by_one=one_by_one,
        together=together,
        ratio=together / one_by_one,
        first_token_seconds=waits,
        first_token_alone=alone,
        memory_growth=max(memory[-5:]) - max(memory[: SETTLED // AT_ONCE]),
        requests=MANY // AT_ONCE * AT_ONCE,
    )


def main(
    model: Annotated[str, typer.Option(help="A folder or an id of the Hub.")],
    output: Annotated[Path | None, typer.Option(help="A JSON file to write.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the weights.")] = "float32",
    threads: Annotated[int | None, typer.Option(help="Of torch. [default: torch's]")] = None,
) -> None:
    """Measure how a server does with many clients at once."""
    if threads is not None:
        torch.set_num_threads(threads)
    figures = measure_serving(load_text_model(model, dtype=dtype))
    found = {"model": Path(model).name, "dtype": dtype, "threads": torch.get_num_threads(), **asdict(figures)}
    text = json.dumps(found | {"environment": environment()}, indent=1)
    typer.echo(text)
    if output is not None:
        write_text(output, text + "\n")


if __name__ == "__main__":
    typer.run(main)
