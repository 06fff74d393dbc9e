"""What is to be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from benchmarks.accounts import KEPT, OPEN
from benchmarks.results import LEVELS, Results
from benchmarks.servers import DOCKER_REGISTRY, HYTHE, HYTHE_2, NGINX


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
    _faster("accounts, manifest by tag", 0.8, OPEN, KEPT),
    _faster("accounts, blob pull over TLS", 0.8, NGINX.name),
    _faster("accounts, blob pull over TLS by 4 clients", 0.8, NGINX.name),
    _below("start", 1),
    _below("memory, idle", 80),
)
