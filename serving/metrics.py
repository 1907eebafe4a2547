"""What the server counts, in Prometheus's form (`/metrics`)."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FIRST_TOKEN_SECONDS = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Numbers of one server, under their names in Prometheus with `ttt_e2e_` before them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests_waiting = self._gauge("requests_waiting", "Prompts that wait for a row")
        self.rows_reading = self._gauge("rows_reading", "Prompts that are being read")
        self.rows_writing = self._gauge("rows_writing", "Texts that are being written")
        self.prefix_bytes = self._gauge("prefix_bytes", "Learned contexts of earlier requests that are kept")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were read")
        self.reused_tokens = self._counter("reused_tokens", "Tokens of prompts that an earlier request had read")
        self.generation_tokens = self._counter("generation_tokens", "Tokens written")
        self.inner_steps = self._counter("inner_steps", "Inner steps taken")
        self.requests_finished = Counter(
            "ttt_e2e_requests_finished",
            "Prompts that came to an end, by why: done, gone (the client went away), failed",
            ["reason"],
            registry=self.registry,
        )
        self.first_token = Histogram(
            "ttt_e2e_time_to_first_token_seconds",
            "From a prompt's arrival to its first token",
            buckets=FIRST_TOKEN_SECONDS,
            registry=self.registry,
        )

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"ttt_e2e_{name}", text, registry=self.registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"ttt_e2e_{name}", text, registry=self.registry)
