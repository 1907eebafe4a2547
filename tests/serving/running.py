"""A server in a thread, with the small model and two learned contexts."""

import json
import socket
import threading
import time

import pytest
import requests

from ttt_e2e import TTTE2ECache
from ttt_e2e.serving import ContextFolder, StoredContext, read_documents, text_tokens, write, write_context

from .small import BOOK, GREEDY, small_text_model

TOKENS, MOST, LIMIT = 12, 100_000, 2**20
PACKAGES = ("openai", "fastapi", "uvicorn", "prometheus_client")
PROMPTS = [
    f"{word} river ran by the {word} mill, and" for word in "the old end water house evening goes nobody".split()
]


def skip_without_server():
    for package in PACKAGES:
        pytest.importorskip(package, reason="needs the extra serve")


class Served:
    """A server in a thread, and clients of it.

    Args:
        folder: of the contexts.
        largest_request: in bytes.
    """

    def __init__(self, folder, text_model=None, largest_request=LIMIT):
        import uvicorn  # of the extra serve, without which the tests are skipped

        from ttt_e2e.serving.server import TokenLimits, build_app

        self.text_model = text_model or small_text_model()
        self.folder = folder
        for name, text in {"book": BOOK, "tale": BOOK[::-1]}.items():
            ids = text_tokens(text, self.text_model.tokenizer, begin=True)
            empty = StoredContext.new(self.text_model.model)
            write_context(folder / name, read_documents(self.text_model, empty, [(name, ids)]))
        contexts = ContextFolder(folder, self.text_model.model)
        limits = TokenLimits(default=TOKENS, most=MOST)
        app = build_app("small", self.text_model, contexts, largest_request=largest_request, limits=limits)
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]})

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        from openai import OpenAI

        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=60)
        return self

    def __exit__(self, *error):
        self.client.close()
        self.server.should_exit = True
        self.thread.join()

    def complete(self, prompt, **arguments):
        arguments = {"model": "small", "max_tokens": TOKENS, "temperature": 0} | arguments
        return self.client.completions.create(prompt=prompt, **arguments).choices[0].text

    def expected(self, prompt, context=None, tokens=TOKENS, learn_from="context"):
        """What the model writes when nobody else asks."""
        tokenizer, model = self.text_model.tokenizer, self.text_model.model
        cache = TTTE2ECache(model.config)
        if context is not None:
            cache = TTTE2ECache.from_pretrained(self.folder / context, model)
        ids = prompt
        if isinstance(prompt, str):
            ids = text_tokens(prompt, tokenizer, begin=context is None).tolist()
        arguments = GREEDY | {"max_new_tokens": tokens, "learn_from": learn_from}
        return tokenizer.decode(write(model, ids, cache, **arguments), skip_special_tokens=True)

    def post(self, path="completions", content=None, **body):
        headers = {"content-type": "application/json"}
        return requests.post(f"{self.url}/v1/{path}", data=content or json.dumps(body), headers=headers, timeout=60)


def complaint(answer: requests.Response) -> str:
    """The message of an error."""
    return answer.json()["error"]["message"]


def wait_until(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.2)
    return condition()
