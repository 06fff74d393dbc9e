"""Numbers for Prometheus.

They are counted in plain dictionaries, a microsecond a request, and become metrics when somebody asks. Where
several processes serve, each leaves its numbers in a file now and then, and whoever is asked adds them up.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

#: Upper bounds in seconds.
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0, 600.0)


class _Latency(msgspec.Struct):
    buckets: list[int] = msgspec.field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0


class _Counts(msgspec.Struct):
    requests: dict[str, int] = {}
    latencies: dict[str, _Latency] = {}
    bytes_in: int = 0
    bytes_out: int = 0
    store_requests: dict[str, int] = {}


class Metrics:
    """What this process counted, and what the others did."""

    def __init__(self, shared: Path | None = None, store_requests: Mapping[str, int] | None = None) -> None:
        """Count.

        Args:
            shared: a directory where the processes of one server leave their numbers, if there are several.
            store_requests: what the store counts by itself.
        """
        self._store_requests = {} if store_requests is None else store_requests
        self._requests: defaultdict[tuple[str, str, int], int] = defaultdict(int)
        self._latencies: defaultdict[str, _Latency] = defaultdict(_Latency)
        self._bytes_in = 0
        self._bytes_out = 0
        self._shared = shared

    def count(self, route: str, method: str, status: int, duration: float, bytes_in: int, bytes_out: int) -> None:
        """Count one request; `duration` in seconds."""
        self._requests[route, method, status] += 1
        latency = self._latencies[route]
        latency.buckets[bisect_left(BUCKETS, duration)] += 1
        latency.total += duration
        self._bytes_in += bytes_in
        self._bytes_out += bytes_out

    def share(self) -> None:
        """Leave the numbers for the other processes. Blocks on a small file."""
        if self._shared:
            path = self._shared / f"{os.getpid()}.json"
            temporary = path.with_suffix(".new")
            temporary.write_bytes(msgspec.json.encode(self._counts()))
            temporary.replace(path)

    def render(self, upload_sessions: int) -> bytes:
        """Return all numbers in Prometheus' text format. Blocks on small files."""
        registry = CollectorRegistry(auto_describe=False)
        registry.register(_Snapshot(self._all(), upload_sessions))
        return generate_latest(registry)

    def _counts(self) -> _Counts:
        return _Counts(
            requests={f"{route} {method} {status}": n for (route, method, status), n in self._requests.items()},
            latencies=dict(self._latencies),
            bytes_in=self._bytes_in,
            bytes_out=self._bytes_out,
            store_requests=dict(self._store_requests),
        )

    def _all(self) -> list[_Counts]:
        counts = [self._counts()]
        others = self._shared.glob("*.json") if self._shared else ()
        own = str(os.getpid())
        return counts + [msgspec.json.decode(path.read_bytes(), type=_Counts) for path in others if path.stem != own]


class _Snapshot:
    """The collector that prometheus_client asks."""

    def __init__(self, counts: Iterable[_Counts], upload_sessions: int) -> None:
        self._requests: defaultdict[str, int] = defaultdict(int)
        self._latencies: defaultdict[str, _Latency] = defaultdict(_Latency)
        self._store_requests: defaultdict[str, int] = defaultdict(int)
        self._bytes_in = self._bytes_out = 0
        self._upload_sessions = upload_sessions
        for one in counts:
            self._add(one)

    def _add(self, one: _Counts) -> None:
        self._bytes_in += one.bytes_in
        self._bytes_out += one.bytes_out
        for key, number in one.requests.items():
            self._requests[key] += number
        for kind, number in one.store_requests.items():
            self._store_requests[kind] += number
        for route, latency in one.latencies.items():
            known = self._latencies[route]
            known.buckets = [a + b for a, b in zip(known.buckets, latency.buckets, strict=True)]
            known.total += latency.total

    def collect(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("hythe_requests", "Requests answered.", labels=("route", "method", "code"))
        for key, number in sorted(self._requests.items()):
            requests.add_metric(key.split(" "), number)
        yield requests
        latency = HistogramMetricFamily("hythe_request_seconds", "Time to answer.", labels=("route",))
        for route, values in sorted(self._latencies.items()):
            latency.add_metric((route,), _cumulative(values.buckets), values.total)
        yield latency
        store = CounterMetricFamily("hythe_store_requests", "Requests made to the object store.", labels=("kind",))
        for kind, number in sorted(self._store_requests.items()):
            store.add_metric((kind,), number)
        yield store
        yield CounterMetricFamily("hythe_received_bytes", "Bytes of bodies received.", self._bytes_in)
        yield CounterMetricFamily("hythe_sent_bytes", "Bytes of bodies sent.", self._bytes_out)
        yield GaugeMetricFamily("hythe_upload_sessions", "Uploads begun and not ended.", self._upload_sessions)


def _cumulative(buckets: list[int]) -> list[tuple[str, float]]:
    result, so_far = [], 0
    for bound, number in zip([*map(str, BUCKETS), "+Inf"], buckets, strict=True):
        so_far += number
        result.append((bound, float(so_far)))
    return result
