"""A million tokens in one document, read by the command, the page and the server: memory does not grow on the way."""

import random
import subprocess
import sys
import threading

import psutil
import pytest
import requests

from ttt_e2e.app import ModelQueue, Session
from ttt_e2e.serving import text_tokens

from ..modeling.tiny_tokenizer import SENTENCES
from .running import Served, skip_without_server
from .small import save_text_model, small_text_model

pytestmark = pytest.mark.slow

TOKENS = 1_000_000
WIDE = {"sliding_window": 256, "mini_batch_size": 128}
# What Python's and the C library's allocators take and give back meanwhile. Keys and values of full attention would be
# a gigabyte.
ROOM = 32 * 2**20


@pytest.fixture(scope="module")
def text_model():
    return small_text_model(**WIDE)


@pytest.fixture(scope="module")
def text():
    """Words in an order that does not come again, of two tokens each."""
    return " ".join(random.Random(0).choices(" ".join(SENTENCES).split(), k=11 * TOKENS // 20))


@pytest.fixture(scope="module")
def tokens(text_model, text):
    return len(text_tokens(text, text_model.tokenizer, True))


class MemoryWatch(threading.Thread):
    """Samples the memory of a process until `stop` or its end.

    Args:
        process: to look at.
        begun: whether reading is under way; nothing is sampled before.
    """

    def __init__(self, process: psutil.Process, begun=lambda: True):
        super().__init__(daemon=True)
        self.process, self.begun, self.samples, self.ended = process, begun, [], threading.Event()

    def run(self):
        while not self.ended.wait(0.2):
            try:
                if self.begun():
                    self.samples.append(self.process.memory_info().rss)
            except psutil.NoSuchProcess:
                return

    def stop(self):
        self.ended.set()
        self.join()

    @property
    def growth(self) -> int:
        """Bytes, from the second tenth of the time to its last half."""
        count = len(self.samples)
        assert count > 50, "too short to tell"
        return max(self.samples[count // 2 :]) - max(self.samples[count // 10 : count // 5])


def test_the_command(text_model, text, tokens, tmp_path):
    model, document = save_text_model(text_model, tmp_path / "model"), tmp_path / "long.txt"
    document.write_text(text)
    command = [sys.executable, "-m", "ttt_e2e.cli.main", "read", "--model", str(model), "--dtype", "float32"]
    command += ["--document", str(document), "--output", str(tmp_path / "context")]
    with open(tmp_path / "log", "w+") as log, subprocess.Popen(command, stdout=log, stderr=log) as reading:
        watch = MemoryWatch(psutil.Process(reading.pid), lambda: "%|" in (tmp_path / "log").read_text())
        watch.start()
        assert reading.wait() == 0, (tmp_path / "log").read_text()[-2000:]
        watch.stop()
    assert f"{tokens:,} tokens" in (tmp_path / "log").read_text()
    assert watch.growth < ROOM


def test_the_page(text_model, text, tokens):
    session = Session(text_model, ModelQueue())
    session.add_document("long", text)
    watch, kept = MemoryWatch(psutil.Process()), []
    watch.start()
    for progress in session.read_on():
        kept.append(progress.kept)
    watch.stop()
    assert progress.tokens == tokens > TOKENS and len(progress.learning.points()) <= 64
    assert kept[-1] <= max(kept[: len(kept) // 10])
    assert watch.growth < ROOM


def test_the_server(text_model, text, tokens, tmp_path):
    skip_without_server()
    with Served(tmp_path, text_model, largest_request=2 * len(text)) as served:

        def read():
            lines = requests.get(f"{served.url}/metrics", timeout=60).text.splitlines()
            return next(float(line.split()[1]) for line in lines if line.startswith("ttt_e2e_prompt_tokens_total "))

        watch = MemoryWatch(psutil.Process(), lambda: read() > 0)
        watch.start()
        sent = {"model": "small", "prompt": text, "max_tokens": 4, "temperature": 0}
        answer = requests.post(f"{served.url}/v1/completions", json=sent, timeout=3600)
        watch.stop()
        assert answer.json()["usage"]["prompt_tokens"] == tokens, answer.text[:500]
    assert watch.growth < ROOM
