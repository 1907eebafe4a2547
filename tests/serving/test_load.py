"""Many clients at once, of whom some go away, read slowly or send nonsense: nothing is lost, mixed or kept."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import requests

from .running import PROMPTS, TOKENS
from .small import save_text_model, small_text_model

pytestmark = pytest.mark.slow

CLIENTS, REQUESTS = 32, 1000
CONTEXTS = (None, "book", "tale")
BODIES = ("{no json", "[1]", '{"prompt": ""}', '{"prompt": "x", "max_tokens": -1}', '{"prompt": [999]}')


def test_a_thousand_requests_of_32_clients(served):
    expected = {(prompt, context): served.expected(prompt, context) for prompt in PROMPTS for context in CONTEXTS}
    process, memory, answered = psutil.Process(), [], []

    def body(choose):
        prompt, context = choose.choice(PROMPTS), choose.choice(CONTEXTS)
        found = {"model": "small", "prompt": prompt, "max_tokens": TOKENS, "temperature": 0}
        return (prompt, context), found | ({} if context is None else {"context": context})

    def ask(number):
        choose = random.Random(number)
        (key, sent), kind = body(choose), choose.random()
        if kind < 0.1:  # nonsense
            assert served.post(content=choose.choice(BODIES)).status_code in (400, 422)
        elif kind < 0.25:  # goes away
            long = sent | {"max_tokens": 5000, "stream": choose.random() < 0.5}
            try:
                with requests.post(f"{served.url}/v1/completions", json=long, stream=True, timeout=0.3) as answer:
                    next(answer.iter_lines())
            except requests.RequestException:
                pass
        elif kind < 0.4:  # reads slowly
            streamed = requests.post(
                f"{served.url}/v1/completions", json=sent | {"stream": True}, stream=True, timeout=300
            )
            lines = []
            for line in streamed.iter_lines():
                lines.append(line)
                time.sleep(0.02)
            chunks = [json.loads(line[5:]) for line in lines if line.startswith(b"data: {")]
            text = "".join(chunk["choices"][0]["text"] for chunk in chunks if chunk["choices"])
            assert expected[key].startswith(text) and len(text) >= len(expected[key].rstrip("\ufffd"))
        else:
            answer = requests.post(f"{served.url}/v1/completions", json=sent, timeout=300)
            assert answer.json()["choices"][0]["text"] == expected[key]
        answered.append(number)
        if len(answered) % 100 == 0:
            gc.collect()
            memory.append(process.memory_info().rss)

    with ThreadPoolExecutor(CLIENTS) as clients:
        list(clients.map(ask, range(REQUESTS)))
    assert sorted(answered) == list(range(REQUESTS))
    # The prefix store and the allocator fill up at first; what each request left behind would go on growing.
    assert memory[-1] - memory[2] < 64 * 2**20
    numbers = requests.get(f"{served.url}/metrics", timeout=60).text
    assert "ttt_e2e_rows_writing 0.0" in numbers and "ttt_e2e_requests_waiting 0.0" in numbers


def test_it_ends_when_all_that_was_begun_is_answered(tmp_path):
    """SIGTERM in the middle of several answers; two servers on one folder of contexts."""
    save_text_model(small_text_model(), tmp_path / "model")
    (tmp_path / "contexts").mkdir()
    command = [
        sys.executable,
        "-m",
        "ttt_e2e.cli.main",
        "serve",
        "--model",
        str(tmp_path / "model"),
        "--port",
        "0",
        "--name",
        "small",
    ]
    command += ["--contexts", str(tmp_path / "contexts")]
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    servers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(2)]
    try:
        addresses = []
        for server in servers:
            line = next(line for line in server.stdout if "http://" in line)
            addresses.append(line.split(" at ")[1].split("/v1")[0])
        sent = {"model": "small", "prompt": PROMPTS[0], "max_tokens": 200, "temperature": 0}
        with ThreadPoolExecutor(8) as clients:
            begun = [
                clients.submit(requests.post, f"{addresses[n % 2]}/v1/completions", json=sent, timeout=300)
                for n in range(8)
            ]
            time.sleep(1)
            for server in servers:
                server.send_signal(signal.SIGTERM)
            answers = [one.result() for one in begun]
        assert [answer.status_code for answer in answers] == [200] * 8, [answer.text[:300] for answer in answers]
        assert len({answer.json()["choices"][0]["text"] for answer in answers}) == 1
        assert all(server.wait(timeout=60) is not None for server in servers)
        with pytest.raises(requests.ConnectionError):
            requests.get(f"{addresses[0]}/health", timeout=5)
    finally:
        for server in servers:
            server.kill()
