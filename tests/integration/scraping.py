"""Reading metrics as Prometheus does."""

from __future__ import annotations

import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, ...], float]


def read(text: bytes | str) -> Samples:
    """`(name, *values of the labels in the order of their names) -> value`."""
    found: Samples = {}
    for family in text_string_to_metric_families(text.decode() if isinstance(text, bytes) else text):
        for sample in family.samples:
            key = (sample.name, *(value for _, value in sorted(sample.labels.items())))
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def scrape(port: int) -> str:
    """The text that a worker's own port gives. Raises OSError while nobody listens."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
        text: Any = answer.read()
    return str(text.decode())


def of(samples: Samples, name: str) -> Samples:
    """The samples of one name, by their labels, without those that are 0."""
    return {key[1:]: value for key, value in samples.items() if key[0] == name and value}
