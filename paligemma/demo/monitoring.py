"""What tells those who run the page how it does: `/health`, and with `--metrics` also `/metrics` for Prometheus."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from .serving import Answer, Models, task_word

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from prometheus_client.metrics_core import Metric
    from starlette.requests import Request

    from .blocks import Page

    Check = Callable[[str, str], Awaitable[bool]]

FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5)  # seconds

# What `VisionLanguageModel.figures` counts, with the names and words of Prometheus.
GAUGES = {
    "active_rows": "Answers that are decoded together",
    "queue_length": "Prompts that wait for their prefill",
    "cache_bytes": "Bytes of the cache of keys and values",
    "gpu_memory_bytes": "Bytes of GPU memory that tensors take",
}
COUNTERS = {
    "feature_cache_hits": "Images whose features were kept",
    "feature_cache_misses": "Images that the vision encoder has read",
}


def health_route(models: Models) -> Route:
    """`/health`: the state of the first checkpoint, see `Models.state`, with 200 where it is ready, else 503."""

    async def health(request: Request) -> Response:
        state = models.state(models.names[0])
        return JSONResponse({"status": state}, status_code=200 if state == "ready" else 503)

    return Route("/health", health)


class Metrics:
    """Counts answers as they end, and reads the engines and the queue when it is asked; needs `prometheus_client`."""

    def __init__(self, models: Models, page: Page):
        from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector

        self._models, self._page = models, page
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        self._registry.register(self)
        labels: dict[str, Any] = {"labelnames": ("checkpoint", "task"), "registry": self._registry}
        outcomes: dict[str, Any] = labels | {"labelnames": ("checkpoint", "task", "outcome")}
        self._requests = Counter("paligemma_requests", "Prompts, by what became of them", **outcomes)
        self._first_token = Histogram(
            "paligemma_time_to_first_token_seconds",
            "From a prompt's turn to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            **labels,
        )
        self._token = Histogram(
            "paligemma_time_per_token_seconds", "Between two tokens of an answer", buckets=TOKEN_BUCKETS, **labels
        )
        models.observers.append(self._observe)

    def _observe(self, checkpoint: str, answers: Sequence[Answer], outcome: str) -> None:
        for answer in answers:
            labels = checkpoint, task_word(answer.prompt)
            self._requests.labels(*labels, "finished" if answer.is_finished else outcome).inc()
            if answer.times:
                self._first_token.labels(*labels).observe(answer.times[0])
            for before, after in zip(answer.times, answer.times[1:]):
                self._token.labels(*labels).observe(after - before)

    def collect(self) -> Iterator[Metric]:
        """What can be read at any time; Prometheus' client calls it."""
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily

        waiting = GaugeMetricFamily("paligemma_page_queue_length", "Calls that wait for their turn")
        waiting.add_metric([], len(self._page._queue))
        refused = CounterMetricFamily(
            "paligemma_page_refused", "Calls that were asked to come again", labels=["reason"]
        )
        for reason, count in self._page.refused.items():
            refused.add_metric([reason], count)
        yield from (waiting, refused)
        loaded = [(name, vlm.figures()) for name in self._models.names if (vlm := self._models.loaded(name))]
        for family, words in ((GaugeMetricFamily, GAUGES), (CounterMetricFamily, COUNTERS)):
            for figure, meaning in words.items():
                metric = family(f"paligemma_{figure}", meaning, labels=["checkpoint"])
                for name, figures in loaded:
                    if figure in figures:
                        metric.add_metric([name], figures[figure])
                yield metric

    def route(self, check: Check | None) -> Route:
        """`/metrics`, in the format that the caller asks for.

        Args:
            check: whether a name and a password, as HTTP's basic authentication brings them, may read it; None: anybody.
        """
        from prometheus_client.exposition import choose_encoder

        async def metrics(request: Request) -> Response:
            if check is not None and not await check(*_credentials(request)):
                return PlainTextResponse(
                    "The metrics of this page need its name and password.",
                    status_code=401,
                    headers={"WWW-Authenticate": 'Basic realm="PaliGemma"'},
                )
            encode, content_type = choose_encoder(request.headers.get("accept", ""))
            # In a thread, since figures of other machines take a while.
            return Response(await run_in_threadpool(encode, self._registry), headers={"Content-Type": content_type})

        return Route("/metrics", metrics)


def _credentials(request: Request) -> tuple[str, str]:
    """The name and password of a request; empty ones if there are none."""
    kind, _, encoded = request.headers.get("authorization", "").partition(" ")
    try:
        user, _, password = base64.b64decode(encoded if kind.lower() == "basic" else "").decode().partition(":")
    except ValueError:  # no base64, or no UTF-8 in it
        return "", ""
    return user, password
