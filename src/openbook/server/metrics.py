"""What the server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from openbook.engine.events import EngineStats

CONTENT_TYPE = CONTENT_TYPE_LATEST
_LONG_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SHORT_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)

# Field of EngineStats to the metric's name and text: what an engine has now, and what it counts since its start.
_NOW = {
    "num_running": ("running_sequences", "Sequences that are running."),
    "num_waiting": ("waiting_requests", "Requests in the queue."),
    "num_blocks": ("cache_blocks", "Blocks of the cache."),
    "num_free_blocks": ("cache_free_blocks", "Blocks of the cache that are free, or hold only a reusable prefix."),
}
_SO_FAR = {
    "num_steps": ("steps", "Steps."),
    "num_prompt_tokens": ("prompt_tokens", "Tokens of prompts that were computed."),
    "num_cached_tokens": ("cached_tokens", "Tokens of prompts that were found in the cache."),
    "num_new_tokens": ("new_tokens", "Tokens generated."),
    "num_preempted": ("preempted", "Sequences sent back to waiting because the cache was full."),
    "num_draft_tokens": ("draft_tokens", "Tokens that speculation drafted."),
    "num_accepted_tokens": ("accepted_tokens", "Drafted tokens that were right."),
    "step_s": ("step_seconds", "Seconds spent in steps."),
    "model_s": ("model_seconds", "Seconds of the steps that the model took."),
}


class ModelMetrics(NamedTuple):
    """The figures of one model."""

    prompt_tokens: Counter
    answer_tokens: Counter
    cancelled: Counter
    first_token_s: Histogram
    between_tokens_s: Histogram
    total_s: Histogram


class Metrics:
    """The figures of one server; labels are names of served models, routes and statuses, of which there are few."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._engines = _EngineCollector()
        registry.register(self._engines)
        self.requests = Counter("openbook_requests", "Requests answered.", ["route", "status"], registry=registry)
        self.open_requests = Gauge("openbook_open_requests", "Requests being answered.", registry=registry)
        self.finished = Counter(
            "openbook_sequences", "Sequences, by the reason of their end.", ["model", "reason"], registry=registry
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts, cached ones included.")
        self.answer_tokens = self._counter("answer_tokens", "Tokens of answers.")
        self.cancelled = self._counter("cancelled_requests", "Requests whose client left before the end.")
        self.first_token_s = self._histogram("time_to_first_token_seconds", "From request to first token.", _LONG_S)
        self.between_tokens_s = self._histogram("time_between_tokens_seconds", "From token to token.", _SHORT_S)
        self.total_s = self._histogram("generation_seconds", "From request to last token.", _LONG_S)
        self._of_models: dict[str, ModelMetrics] = {}

    def of(self, model: str) -> ModelMetrics:
        """The figures of a model; looked up once for all tokens of a request, as that takes longer than counting."""
        if model not in self._of_models:
            self._of_models[model] = ModelMetrics(*(getattr(self, name).labels(model) for name in ModelMetrics._fields))
        return self._of_models[model]

    def text(self, stats: Sequence[tuple[str, EngineStats]]) -> bytes:
        """All figures in Prometheus' text format; `stats`: of each model's engine, by the model's name."""
        self._engines.stats = stats
        return generate_latest(self._registry)

    def _counter(self, name: str, text: str) -> Counter:
        return Counter(f"openbook_{name}", text, ["model"], registry=self._registry)

    def _histogram(self, name: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        return Histogram(f"openbook_{name}", text, ["model"], registry=self._registry, buckets=bounds)


class _EngineCollector(Collector):
    """Passes on what engines count themselves."""

    def __init__(self) -> None:
        self.stats: Sequence[tuple[str, EngineStats]] = ()

    def collect(self) -> Iterator[Metric]:
        families: list[tuple[type[GaugeMetricFamily | CounterMetricFamily], dict[str, tuple[str, str]]]] = [
            (GaugeMetricFamily, _NOW),
            (CounterMetricFamily, _SO_FAR),
        ]
        for family_type, fields in families:
            for field, (name, text) in fields.items():
                family = family_type(f"openbook_engine_{name}", text, labels=["model"])
                for model, now in self.stats:
                    family.add_metric([model], getattr(now, field))
                yield family
