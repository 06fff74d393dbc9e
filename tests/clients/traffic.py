"""What a server was asked for, as its metrics tell."""

from __future__ import annotations

import urllib.request
from collections import Counter
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from tests.services.processes import HytheServer

#: Route, method, status.
Request = tuple[str, str, int]


@dataclass
class Traffic:
    """Counts requests since it was last asked."""

    server: HytheServer
    seen: Counter[Request] = field(default_factory=Counter)

    def new(self) -> Counter[Request]:
        """Return what was answered since the last call, or since the start."""
        now = self._all()
        fresh = now - self.seen
        self.seen = now
        return fresh

    def _all(self) -> Counter[Request]:
        requests: Counter[Request] = Counter()
        for sample in self._samples("hythe_requests_total"):
            labels = sample[0]
            requests[labels["route"], labels["method"], int(labels["code"])] += int(sample[1])
        return requests

    def value(self, name: str) -> float:
        """Return a number that has no labels."""
        (sample,) = self._samples(name)
        return sample[1]

    def _samples(self, name: str) -> list[tuple[dict[str, str], float]]:
        with urllib.request.urlopen(f"{self.server.url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        families = text_string_to_metric_families(text)
        return [
            (sample.labels, sample.value) for family in families for sample in family.samples if sample.name == name
        ]


def uploads_in(requests: Counter[Request]) -> Counter[Request]:
    """Return those that send blobs, or begin to."""
    return Counter({request: number for request, number in requests.items() if request[0] in ("uploads", "upload")})
