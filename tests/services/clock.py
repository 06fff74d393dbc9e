"""A clock that goes on only when it is told to, for one module."""

from __future__ import annotations

import time

import pytest


class Clock:
    """Takes the place of `time` in a module, whose hours pass without waiting."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        """Stand still in `module`, now."""
        self._at = time.time()
        monkeypatch.setattr(f"{module}.time", self)

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self._at += seconds

    def time(self) -> float:
        return self._at

    def time_ns(self) -> int:
        return int(self._at * 1_000_000_000)

    def monotonic(self) -> float:
        return self._at
