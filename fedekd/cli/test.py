"""`test`: evaluate the final checkpoint of a finished run again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.table import Table

from fedekd.cli.arguments import add_trained_arguments
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.configuration.trained import open_site, require_one_source
from fedekd.federation.run_folder import RunFolder, first_difference
from fedekd.methods import Client
from fedekd.methods.serving import CANDIDATE, LOCAL
from fedekd.reporting import metrics_csv, result_tables
from fedekd.reporting.console import PlainConsole

#: Keys of `summary.json` that depend on the machine and the date.
_UNREPEATABLE = ("seconds", "versions")


def run(argv: Sequence[str]) -> int:
    """Run `test RUN` or `test --site FOLDER`; the exit code is 1 for a difference."""
    parser = ArgumentParser(
        prog="orchestrator.py test",
        usage="%(prog)s RUN | --site FOLDER",
        description="Evaluate the final checkpoint of a finished run again and compare the results with summary.json"
        " and metrics.csv; at a site of a Flower run, compare the metrics with those of the last round. Exit code 1 if"
        " they differ.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_trained_arguments(parser)
    config = parse(parser, argv)
    require_one_source("test", config.run, config.site)
    return _test_site(Path(config.site)) if config.site else _test_run(Path(config.run))


def _test_site(folder: Path) -> int:
    """Evaluate the networks of a site again, and compare with the stored metrics."""
    trained, console = open_site("test", folder), PlainConsole()
    [client] = trained.clients
    stored = {client.served_role: dict(trained.records[client.number].metrics)}
    with trained.spec.trainer.numerics():
        now = {client.served_role: client.evaluate()[1]}
        if client.deployed_role == LOCAL:
            stored[LOCAL], now[LOCAL] = dict(trained.local_metrics[client.number]), client.evaluate(role=LOCAL)[1]
        elif client.candidate is not None:
            name = f"candidate {client.candidate.name}"
            stored[name] = dict(trained.records[client.number].deployed_metrics)
            now[name] = client.evaluate(role=CANDIDATE)[1]
    console.print(_metrics_table(client, now))
    if difference := first_difference(stored, now):
        key, old, new = difference
        console.print(f"differs from the last round: {key} was {old}, is now {new}", soft_wrap=True)
        return 1
    console.print("the same as after the last round, to the last digit")
    return 0


def _metrics_table(client: Client, metrics: Mapping[str, Mapping[str, float]]) -> Table:
    """Format the metrics of the networks of a site on its test split."""
    title = f"{client.splits.label}: {len(client.splits.test)} test samples, deployed: {client.deployed_name}"
    table = Table("metric", title=title)
    for role in metrics:
        table.add_column(role, justify="right")
    for name in metrics[client.served_role]:
        table.add_row(name, *("-" if (value := part[name]) != value else f"{value:.4f}" for part in metrics.values()))
    return table


def _test_run(folder: Path) -> int:
    """Evaluate a run again, and compare with its files."""
    orchestrator, config, saved = open_finished("test", folder, verified=["config.yaml"])
    summary = orchestrator.evaluate_checkpoint()
    console = PlainConsole()
    for table in result_tables(summary, config.metrics):
        console.print(table)
    before, now = ({k: v for k, v in content.items() if k not in _UNREPEATABLE} for content in (saved, summary))
    if difference := first_difference(before, now):
        key, old, new = difference
        console.print(f"differs from summary.json: {key} was {old}, is now {new}", soft_wrap=True)
        return 1
    progress = orchestrator.progress
    if line := _first_different_line(folder / "metrics.csv", metrics_csv(progress.history, progress.names)):
        console.print(
            f"metrics.csv differs from the checkpoint in line {line}; written again by: fit --resume {folder}",
            soft_wrap=True,
        )
        return 1
    RunFolder(folder, {}).require_intact("metrics.csv", "summary.json")
    console.print("the same as summary.json, to the last digit")
    return 0


def _first_different_line(path: Path, expected: bytes) -> int | None:
    """Return the number of the first line of a file that differs; None if none does."""
    content = path.read_bytes() if path.exists() else b""
    if content == expected:
        return None
    lines = zip_longest(content.splitlines(), expected.splitlines())
    return next((number for number, (ours, theirs) in enumerate(lines, start=1) if ours != theirs), 1)
