"""What was measured, and in which units it is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, Final

from benchmarks.measures import Level, Result, Sample


@dataclass(frozen=True)
class Unit:
    """How a measure is told: rates of `amount` in `rate`, processor time for each `per`."""

    rate: str
    amount: float
    cpu: str
    per: float
    cpu_scale: float


_BYTES: Final = Unit("MB/s", 1e6, "CPU s/GiB", 1 << 30, 1)
_BLOBS: Final = Unit("blobs/s", 1, "CPU µs/blob", 1, 1e6)
_REQUESTS: Final = Unit("requests/s", 1, "CPU µs/request", 1, 1e6)
_IMAGES: Final = Unit("images/s", 1, "CPU ms/image", 1, 1e3)

UNITS: Final = {
    "blob push": _BYTES,
    "blob pull": _BYTES,
    "small blobs in": _BLOBS,
    "small blobs out": _BLOBS,
    "manifest by tag": _REQUESTS,
    "manifest by digest": _REQUESTS,
    "image push": _IMAGES,
    "S3, blob push": _BYTES,
    "S3, blob pull": _BYTES,
    "S3, small blobs in": _BLOBS,
    "S3, small blobs out": _BLOBS,
    "S3, image push": _IMAGES,
    "accounts, manifest by tag": _REQUESTS,
    "accounts, a new token": _REQUESTS,
    "accounts, blob pull over TLS": _BYTES,
    "accounts, blob pull over TLS by 4 clients": _BYTES,
    "accounts, blob push over TLS": _BYTES,
}
LEVELS: Final = {
    "start": ("s", 1.0),
    "memory, idle": ("MB", 1e6),
    "memory, peak with a large blob": ("MB", 1e6),
    "memory, peak with small blobs": ("MB", 1e6),
    "S3 requests, image of 10 layers in": ("requests", 1.0),
    "S3 requests, image of 10 layers out": ("requests", 1.0),
    "S3, a small blob in, p50": ("ms", 1e-3),
    "S3, a small blob in, p99": ("ms", 1e-3),
    "S3, memory, peak with 8 large layers": ("MB", 1e6),
    "accounts, start": ("s", 1.0),
    "accounts, memory, idle": ("MB", 1e6),
    "accounts, memory after the first token": ("MB", 1e6),
}
#: Groups that are measured apart, by what their measures begin with; all others are one.
APART: Final = ("S3", "accounts")


class Results:
    """All that was measured."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._all = results
        self._samples = [result for result in results if isinstance(result, Sample)]
        self._levels = [result for result in results if isinstance(result, Level)]

    def part(self, name: str) -> Results:
        """Return those of a group that is measured apart, or of all others for an empty name."""
        return Results([result for result in self._all if _part_of(result.measure) == name])

    def __bool__(self) -> bool:
        """Whether there is anything."""
        return bool(self._all)

    def servers(self, measure: str) -> list[str]:
        """Return the servers that took part in a measure, in their order."""
        return list(dict.fromkeys(result.server for result in self._all if result.measure == measure))

    def rates(self, measure: str, server: str) -> list[float]:
        """Return amounts per second, one for each round."""
        return [sample.amount / sample.seconds for sample in self._of(measure, server)]

    def rate(self, measure: str, server: str) -> float:
        """Return the median of the amounts per second."""
        return median(self.rates(measure, server))

    def cpu(self, measure: str, server: str) -> float:
        """Return the median of the server's processor seconds for an amount of one."""
        return median(sample.cpu / sample.amount for sample in self._of(measure, server))

    def load_cpu(self, measure: str, server: str) -> float:
        """Return the same of the load."""
        return median(sample.load_cpu / sample.amount for sample in self._of(measure, server))

    def level(self, measure: str, server: str) -> float:
        """Return the median of something that a server has."""
        return median(level.value for level in self._levels if (level.measure, level.server) == (measure, server))

    def _of(self, measure: str, server: str) -> list[Sample]:
        return [sample for sample in self._samples if (sample.measure, sample.server) == (measure, server)]

    def as_data(self) -> dict[str, Any]:
        """Return everything, for programs."""
        return {"samples": list(map(asdict, self._samples)), "levels": list(map(asdict, self._levels))}


def _part_of(measure: str) -> str:
    name = measure.partition(",")[0]
    return name if name in APART else ""
