"""What a server counts, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from finespun.serving.service import ServedModel

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)


class Metrics:
    """Counters of one server; the texts in flight are looked up in `models` when they are asked for."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self.registry = CollectorRegistry()
        self._models = models
        self.registry.register(self)
        name: Any = {"registry": self.registry, "namespace": "finespun"}
        self.requests = Counter("requests", "Requests by route and status.", ["route", "status"], **name)
        self.seconds = Histogram(
            "request_seconds", "Time to the end of the answer.", ["route"], buckets=SECONDS, **name
        )
        self.first_token_seconds = Histogram(
            "first_token_seconds", "Time to the first piece of text.", ["model"], buckets=SECONDS, **name
        )
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts.", ["model"], **name)
        self.completion_tokens = Counter("completion_tokens", "Tokens written.", ["model"], **name)

    def collect(self) -> Iterator[Metric]:
        texts = GaugeMetricFamily("finespun_texts", "Texts in flight.", labels=["model", "state"])
        for name, model in self._models.items():
            texts.add_metric([name, "written"], min(model.in_flight, model.slots))
            texts.add_metric([name, "waiting"], max(0, model.in_flight - model.slots))
        yield texts

    def record(self, request: Mapping[str, Any]) -> None:
        """Counts one request, by what the log says of it."""
        route = request["route"]
        self.requests.labels(route, str(request.get("status", 499))).inc()
        self.seconds.labels(route).observe(request["seconds"])
        if (model := request.get("model")) is not None:
            self.prompt_tokens.labels(model).inc(request.get("prompt_tokens", 0))
            self.completion_tokens.labels(model).inc(request.get("completion_tokens", 0))
            if (first := request.get("first_token_seconds")) is not None:
                self.first_token_seconds.labels(model).observe(first)

    def text(self) -> bytes:
        return generate_latest(self.registry)
