"""What was measured, as text: tables of medians, and whether the targets were reached."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, Final

from benchmarks.measures import Level, Result, Sample
from benchmarks.servers import DOCKER_REGISTRY, HYTHE, HYTHE_2, NGINX, versions

_README: Final = Path(__file__).parent / "README.md"
#: Where the results stand in README.md: by groups that are measured together, so that they can be measured apart.
_PLACES: Final = {"one disk": False, "S3": True}
_BEGIN: Final = "<!-- results, {place}: written by python -m benchmarks --write -->"
_END: Final = "<!-- end of results, {place} -->"


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
}


class Results:
    """All that was measured."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._all = results
        self._samples = [result for result in results if isinstance(result, Sample)]
        self._levels = [result for result in results if isinstance(result, Level)]

    def part(self, *, remote: bool) -> Results:
        """Return those of S3, or all others."""
        return Results([result for result in self._all if result.measure.startswith("S3") == remote])

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


# --- targets ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """Something to reach: a value that is at least, or at most, a limit."""

    text: str
    measure: str
    limit: float
    value: Callable[[Results], float]
    at_least: bool = True
    unit: str = "times"

    def verdict(self, results: Results) -> tuple[str, str, str]:
        """Return the target, what was measured, and whether it was reached."""
        value = self.value(results)
        is_reached = value >= self.limit if self.at_least else value <= self.limit
        return self.text, f"{value:.2f} {self.unit}", "reached" if is_reached else "**missed**"


def _faster(measure: str, limit: float, peer: str = DOCKER_REGISTRY.name, server: str = HYTHE.name) -> Target:
    return Target(
        f"{measure}: {server} at least {limit:g} times as fast as {peer}",
        measure,
        limit,
        lambda results: results.rate(measure, server) / results.rate(measure, peer),
    )


def _lighter(measure: str, limit: float, peer: str) -> Target:
    return Target(
        f"{measure}: at most {limit:g} times the CPU of {peer}",
        measure,
        limit,
        lambda results: results.cpu(measure, HYTHE.name) / results.cpu(measure, peer),
        at_least=False,
    )


def _fewer(measure: str, limit: float) -> Target:
    return Target(
        f"{measure}: at most {limit:g} times those of {DOCKER_REGISTRY.name}",
        measure,
        limit,
        lambda results: results.level(measure, HYTHE.name) / results.level(measure, DOCKER_REGISTRY.name),
        at_least=False,
    )


def _below(measure: str, limit: float) -> Target:
    unit, scale = LEVELS[measure]
    return Target(
        f"{measure}: below {limit:g} {unit}",
        measure,
        limit,
        lambda results: results.level(measure, HYTHE.name) / scale,
        at_least=False,
        unit=unit,
    )


TARGETS: Final = (
    _faster("blob push", 1.8),
    _lighter("blob push", 0.5, DOCKER_REGISTRY.name),
    _faster("blob pull", 1, NGINX.name),
    _lighter("blob pull", 1, NGINX.name),
    _faster("small blobs in", 4),
    _faster("small blobs out", 6),
    _faster("manifest by tag", 8),
    _faster("manifest by digest", 8),
    _faster("manifest by tag", 12, server=HYTHE_2.name),
    _faster("manifest by digest", 12, server=HYTHE_2.name),
    _faster("S3, blob push", 2),
    _fewer("S3 requests, image of 10 layers in", 0.1),
    _below("S3, memory, peak with 8 large layers", 400),
    _below("start", 1),
    _below("memory, idle", 80),
)


# --- tables -------------------------------------------------------------------------------------------------


def render(results: Results) -> str:
    """Return all tables, in Markdown."""
    work = [(measure, unit) for measure, unit in UNITS.items() if results.servers(measure)]
    parts = [f"**{measure}**\n\n{_work_table(results, measure, unit)}" for measure, unit in work]
    levels = [measure for measure in LEVELS if results.servers(measure)]
    if levels:
        parts.append(f"**start, memory, requests**\n\n{_level_table(results, levels)}")
    verdicts = [target.verdict(results) for target in TARGETS if results.servers(target.measure)]
    parts.append(f"**targets**\n\n{table(('target', 'measured', ''), verdicts)}")
    return "\n\n".join(parts)


def _work_table(results: Results, measure: str, unit: Unit) -> str:
    servers = results.servers(measure)
    peer = DOCKER_REGISTRY.name
    head = ("server", unit.rate, "best", f"to {peer}", unit.cpu, f"to {peer}", "load's CPU")
    rows = []
    for server in servers:
        rate, cpu = results.rate(measure, server), results.cpu(measure, server)
        rows.append(
            (
                server,
                _number(rate / unit.amount),
                _number(max(results.rates(measure, server)) / unit.amount),
                f"{rate / results.rate(measure, peer):.2f}",
                _number(cpu * unit.per * unit.cpu_scale),
                f"{cpu / results.cpu(measure, peer):.2f}",
                _number(results.load_cpu(measure, server) * unit.per * unit.cpu_scale),
            )
        )
    return table(head, rows)


def _level_table(results: Results, measures: Sequence[str]) -> str:
    rows = []
    for measure in measures:
        unit, scale = LEVELS[measure]
        rows += [
            (measure, server, f"{_number(results.level(measure, server) / scale)} {unit}")
            for server in results.servers(measure)
        ]
    return table(("", "server", "median"), rows)


def _number(value: float) -> str:
    """Return three digits that matter."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a table in Markdown that can be read as it is."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [" | ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
    rule = " | ".join("-" * max(3, width) for width in widths)
    return "\n".join(f"| {line} |" for line in [lines[0], rule, *lines[1:]])


# --- where and when -----------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Return what the figures depend on."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {_processor()}",
        "kernel": platform.release(),
        "Python": platform.python_version(),
        **versions(),
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def write(command: str, where: dict[str, str], results: Results) -> None:
    """Replace those results in README.md that were measured now."""
    for place, is_remote in _PLACES.items():
        if part := results.part(remote=is_remote):
            _replace(place, command, where, render(part))


def _replace(place: str, command: str, where: dict[str, str], text: str) -> None:
    begin, end = _BEGIN.format(place=place), _END.format(place=place)
    before, begun, rest = _README.read_text(encoding="utf-8").partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{_README} has no place for results: {begin} … {end}")
    facts = ", ".join(f"{name} {value}" for name, value in where.items() if name not in ("date", "machine"))
    section = f"`{command}` on {where['date']}, {where['machine']}, {facts}.\n\n{text}"
    _README.write_text(f"{before}{begin}\n\n{section}\n\n{end}{after}", encoding="utf-8")
