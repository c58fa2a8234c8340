"""The exposition: cells of metrics as the text that Prometheus reads, in its own format or as OpenMetrics.

Imported where it is needed: the package it stands on takes a tenth of a second.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.core import Metric as Family
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from jobs.metrics import PREFIXES, TABLE, Metric, Source
from jobs.tally import ENDS, INFINITE, SUM, Cells

Samples = dict[tuple[str, ...], float]


class Look(Collector):
    """What a function finds each time somebody looks."""

    def __init__(self, look: Callable[[], Iterable[Family]]) -> None:
        self._look = look

    def collect(self) -> Iterable[Family]:
        """The families of metrics at this moment."""
        return self._look()


def families(source: Source, cells: Cells) -> Iterator[Family]:
    """Every metric that this source exports, also those without a value; of the store, the totals are among them.

    A counter without labels has a value from the start: 0.
    """
    by_name: dict[str, Samples] = defaultdict(dict)
    for cell, value in cells.items():
        by_name[cell[0]][cell[1:]] = value
    for metric in TABLE:
        if source in metric.sources or (source == "store" and metric.counted):
            yield _family(PREFIXES[source] + metric.name, metric, by_name[metric.name])


def process() -> Iterable[Family]:
    """What the system knows of this process: `process_*`."""
    return ProcessCollector(registry=CollectorRegistry()).collect()


def render(found: Iterable[Family], accept: str) -> tuple[bytes, str]:
    """The text and its content type, by the request's Accept header."""
    encode, content_type = choose_encoder(accept)
    return encode(Look(lambda: found)), content_type


def _family(name: str, metric: Metric, samples: Samples) -> Family:
    if metric.kind == "histogram":
        return _histogram(name, metric, samples)
    family: CounterMetricFamily | GaugeMetricFamily
    if metric.kind == "counter":
        family = CounterMetricFamily(name, metric.help, labels=metric.labels)
        if not metric.labels:
            samples = {(): 0.0} | samples
    else:
        family = GaugeMetricFamily(name, metric.help, labels=metric.labels)
    for labels, value in sorted(samples.items()):
        family.add_metric(labels, value)
    return family


def _histogram(name: str, metric: Metric, samples: Samples) -> Family:
    family = HistogramMetricFamily(name, metric.help, labels=metric.labels)
    for labels in sorted({cell[:-1] for cell in samples}):
        buckets: list[tuple[str, float]] = []
        count = 0.0
        for end in ENDS[metric.name]:
            count += samples.get((*labels, end), 0)
            buckets.append((end, count))
        assert buckets[-1][0] == INFINITE
        family.add_metric(labels, buckets, samples.get((*labels, SUM), 0.0))
    return family
