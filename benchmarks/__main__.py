"""`python -m benchmarks`: run the measures, print the tables."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click

from benchmarks import report
from benchmarks.measures import QUICK, Sizes
from benchmarks.results import Results
from benchmarks.rounds import GROUPS, run
from benchmarks.servers import BenchmarkError


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--rounds", default=5, show_default=True, type=click.IntRange(1), help="Rounds; medians are told.")
@click.option("--only", multiple=True, type=click.Choice(list(GROUPS)), help="This group; may be given again.")
@click.option("--quick", is_flag=True, help="Small sizes: to see that it works, not to know how fast.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write every sample to a file.")
@click.option("--write", is_flag=True, help="Put the results into benchmarks/README.md.")
@click.option("--dir", "parent", type=click.Path(file_okay=False, exists=True), help="Where the data goes.")
def main(
    rounds: int, only: tuple[str, ...], quick: bool, json_file: Path | None, write: bool, parent: str | None
) -> None:
    """Measure Hythe beside docker-registry and nginx, in turn, on this machine."""
    if write and only not in [(), ("s3",), ("accounts",)]:
        raise click.UsageError("--write takes all groups, or s3, or accounts: the figures of a table are of one run")
    try:
        where = report.environment()
        with tempfile.TemporaryDirectory(prefix="hythe-bench-", dir=parent) as directory:
            sizes = QUICK if quick else Sizes()
            results = Results(list(run(list(only) or list(GROUPS), sizes, rounds, Path(directory))))
    except BenchmarkError as error:
        raise click.ClickException(str(error)) from None
    text = report.render(results)
    print(", ".join(f"{name}: {value}" for name, value in where.items()), text, sep="\n\n")
    if json_file:
        json_file.write_text(json.dumps({"environment": where, **results.as_data()}, indent=1))
    if write:
        report.write(" ".join(["python -m benchmarks", *sys.argv[1:]]), where, results)


main()
