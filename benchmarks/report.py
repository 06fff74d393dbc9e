"""What was measured, as text: tables of medians, and whether the targets were reached."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from benchmarks.results import APART, LEVELS, UNITS, Results, Unit
from benchmarks.servers import versions
from benchmarks.targets import TARGETS

_README: Final = Path(__file__).parent / "README.md"
#: Where the results stand in README.md: by groups that are measured together, so that they can be measured apart.
_PLACES: Final = {"one disk": "", **{name: name for name in APART}}
_BEGIN: Final = "<!-- results, {place}: written by python -m benchmarks --write -->"
_END: Final = "<!-- end of results, {place} -->"


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
    peer = servers[0]
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
    for place, name in _PLACES.items():
        if part := results.part(name):
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
