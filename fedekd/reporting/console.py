"""Progress display of a run, and tables of its results."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fedekd.errors import print_warning, shorten
from fedekd.global_state import exclusive
from fedekd.reporting.rows import (
    Row,
    Summary,
    candidate_rows,
    client_title,
    is_harm,
    metric_spec,
    references_of,
    rule_note,
    value_title,
)

_MAX_CLASS_RANGES = 8  # with more, a table would exceed 80 columns

_LONGEST_NAME = 24  # of a site in tables of many columns


def result_tables(summary: Summary, metrics: Sequence[str] | None = None) -> list[Table]:
    """Build the tables of a finished run: clients, other metrics, do-no-harm.

    Args:
        summary: Content of `summary.json`.
        metrics: Option `metrics` of the run; the table of other metrics is shown only if it is given.
    """
    others = other_metrics_table(summary) if metrics is not None and "metrics" in summary else None
    return [
        client_table(summary),
        *([others] if others is not None else []),
        *([reference_table(summary)] if references_of(summary) else []),
        *([deployed_table(summary)] if "deployed" in summary else []),
        *([candidates_table(summary)] if candidate_rows(summary) else []),
    ]


def other_metrics_table(summary: Summary) -> Table | None:
    """Build the table of all metrics but the primary one: score and Delta.

    Args:
        summary: Content of `summary.json` with `metrics`.

    Returns:
        One row per client, and mean, worst and tail, or one column each if there are more metrics; "-" where the
        client's test split has no value. None if there are no other metrics.
    """
    figures, clients = summary["metrics"], summary["clients"]
    if not figures:
        return None
    titles = [value_title(name, summary) for name in figures]
    rows = [
        (title, [_value_text(name, client["metrics"][name]) for name in figures])
        for title, client in zip(_short_titles(clients), clients, strict=True)
    ]
    for title, part, stat in (("mean", "mean", "avg"), ("worst", "worst", "worst"), ("P10/P90", None, None)):
        cells = []
        for name, values in figures.items():
            tail = stat or metric_spec(name).tail
            cells.append(_value_text(name, {"score": values[part] if part else None, "delta": values["delta"][tail]}))
        rows.append((title, cells))
    table = Table(title=f"{summary['method']} on {summary['dataset']}, other metrics (Delta)")
    if len(figures) > len(rows):  # the terminal has no room for a column per class
        table.add_column("metric", overflow="fold")
        for title, _ in rows:
            table.add_column(title, justify="right", overflow="fold")
        for number, title in enumerate(titles):
            table.add_row(title, *(cells[number] for _, cells in rows))
        return table
    _add_client_column(table, summary)
    for title in titles:
        table.add_column(title, justify="right", overflow="fold")
    for number, (title, cells) in enumerate(rows):
        table.add_row(title, *cells, end_section=number == len(clients) - 1)
    return table


def _value_text(name: str, values: Mapping[str, float | None]) -> Text:
    """Format a value and its Delta, of which one or both may be missing."""
    metric, value, delta = metric_spec(name), values["score"], values["delta"]
    parts = [] if value is None else [metric.text(value)]
    if delta is not None:
        parts.append(f"({metric.difference_text(delta)})")
    is_red = delta is not None and is_harm(delta, name)
    return Text(" ".join(parts) or "-", style="red" if is_red else "")


def client_table(summary: Summary) -> Table:
    """Build the table of scores per client, with mean, worst and tail below.

    Args:
        summary: Content of `summary.json`; `classes` of a client, its labels, may be missing.

    Returns:
        Samples, score of the local baseline, score of the method and Delta of each client, and the selected round if
        there is one; harm is red.
    """
    metric, clients, delta = metric_spec(summary["metric"]), summary["clients"], summary["delta"]
    names = summary.get("class_names")
    with_classes = any(client.get("classes") for client in clients)
    with_round = any("selected_round" in client for client in clients)
    table = _empty_client_table(summary, with_classes, with_round)

    def add(
        name: str, samples: tuple[str, str], classes: str, local: str, method: str, change: Text, chosen: str = ""
    ) -> None:
        shown = [classes] if with_classes else []
        table.add_row(name, *samples, *shown, local, method, change, *([chosen] if with_round else []))

    for client in clients:
        labels = client.get("classes", [])
        add(
            client_title(client),
            (str(client["train"]), str(client["test"])),
            _ranges([names[label] for label in labels] if names else labels),
            metric.text(client["local"]),
            metric.text(client["score"]),
            _delta_text(client["delta"], summary),
            str(client.get("selected_round", "")),
        )
    table.add_section()
    local_mean, mean = metric.text(summary["local_mean"]), metric.text(summary["mean"])
    add("mean", ("", ""), "", local_mean, mean, _delta_text(delta["avg"], summary))
    add("worst", ("", ""), "", "", metric.text(summary["worst"]), _delta_text(delta["worst"], summary))
    add(metric.tail.upper(), ("", ""), "", "", "", _delta_text(delta[metric.tail], summary))
    return table


def _empty_client_table(summary: Summary, with_classes: bool, with_round: bool) -> Table:
    """Return the table of scores per client without rows."""
    title = f"{summary['method']} on {summary['dataset']}, {metric_spec(summary['metric']).title}"
    table = Table(title=title)
    _add_client_column(table, summary)
    for heading in ("train", "test"):
        table.add_column(heading, justify="right")
    if with_classes:
        table.add_column("classes", overflow="fold")
    for heading in ("Local", summary["method"], "Delta"):
        table.add_column(heading, justify="right", no_wrap=True)
    if with_round:
        table.add_column("round", justify="right")
    return table


def reference_table(summary: Summary) -> Table:
    """Build the table of references besides the local baseline, and the differences.

    Args:
        summary: Content of `summary.json` with `surplus` or `delta_tuned`.
    """
    metric, references = metric_spec(summary["metric"]), references_of(summary)
    table = Table(title=f"{summary['method']} and its references, {metric.title}")
    _add_client_column(table, summary)
    headings = [heading for *_, score, difference in references for heading in (score, difference)]
    for heading in ("score", *headings):
        table.add_column(heading, justify="right")
    for title, client in zip(_short_titles(summary["clients"]), summary["clients"], strict=True):
        cells: list[str | Text] = [metric.text(client["score"])]
        for score, difference, *_ in references:
            cells += [metric.text(client[score]), _delta_text(client[difference], summary)]
        table.add_row(title, *cells)
    table.add_section()
    for title, part in (("mean", "avg"), ("worst", "worst"), (metric.tail.upper(), metric.tail)):
        cells = [metric.text(summary["mean"]) if part == "avg" else ""]
        for score, difference, *_ in references:
            mean = metric.text(summary[f"{score}_mean"]) if part == "avg" else ""
            cells += [mean, _delta_text(summary[difference][part], summary)]
        table.add_row(title, *cells)
    return table


def deployed_table(summary: Summary) -> Table:
    """Build the table of deployed models, and of Delta before and after.

    Args:
        summary: Content of `summary.json` of a run with `do_no_harm`.
    """
    delta, after = summary["delta"], summary["deployed"]["delta"]
    by_class, tail = summary["task"] == "classification", metric_spec(summary["metric"]).tail
    title = f"do no harm: {rule_note(summary['deployed']['rule'])}"
    table = Table(title=title, collapse_padding=True, pad_edge=False)  # as narrow as possible, for names of sites
    _add_client_column(table, summary)
    for heading in ("compared on", *(("worse", "better") if by_class else ("gain",)), "p", "deployed"):
        table.add_column(heading, justify="right", no_wrap=heading == "deployed", overflow="fold")
    for heading in ("Delta\nbefore", "Delta\nafter"):
        table.add_column(heading, justify="right", no_wrap=True)

    for title, client in zip(_short_titles(summary["clients"]), summary["clients"], strict=True):
        if "deployed" not in client:  # the client took part in no round
            table.add_row(title, *[""] * (5 if by_class else 4), *[_delta_text(client["delta"], summary)] * 2)
            continue
        evidence = (str(client["worse"]), str(client["better"])) if by_class else (format(client["gain"], "+.4g"),)
        p_value = "" if client["p_value"] is None else f"{client['p_value']:.3g}"
        # As in Progress.scores: the local model's Delta is 0, or undefined with its score.
        local_delta = None if client["local"] is None else 0.0
        deployed_delta = client["delta"] if client["deployed"] == "federated" else local_delta
        deployed_delta = client.get("deployed_delta", deployed_delta)
        changes = _delta_text(client["delta"], summary), _delta_text(deployed_delta, summary)
        table.add_row(title, str(client["samples"]), *evidence, p_value, client["deployed"], *changes)
    table.add_section()
    blank = [""] * (5 if by_class else 4)
    for name, key in (("mean", "avg"), ("worst", "worst"), (tail.upper(), tail)):
        table.add_row(name, *blank, _delta_text(delta[key], summary), _delta_text(after[key], summary))
    return table


def candidates_table(summary: Summary) -> Table:
    """Build the table of p-values of the candidates, in the order of the tests.

    Args:
        summary: Content of `summary.json` of a run with `do_no_harm.candidates`.
    """
    rows = candidate_rows(summary)
    table = Table(title="candidates: p-values")
    for name in rows[0]:
        table.add_column(name, justify="right", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    return table


def _add_client_column(table: Table, summary: Summary) -> None:
    """Add the column of the clients: numbers, or the names of sites."""
    has_names = any("name" in client for client in summary["clients"])
    table.add_column("site" if has_names else "client", justify="left" if has_names else "right", overflow="fold")


def _short_titles(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the clients' titles for a table of many columns.

    Long names would fold into many lines.
    """
    titles = [client_title(client) for client in clients]
    short = [shorten(title, _LONGEST_NAME) for title in titles]
    return short if len(set(short)) == len(titles) else titles


def _delta_text(value: float | None, summary: Summary) -> Text:
    """Format a Delta with its sign, red where it is harm; `-` where it is undefined."""
    metric = summary["metric"]
    return Text(metric_spec(metric).difference_text(value), style="red" if is_harm(value, metric) else "")


def _ranges(labels: Sequence[int | str]) -> str:
    """Format class labels: integers as ranges; of many labels only the number."""
    if not all(isinstance(label, int) for label in labels):
        parts = [str(label) for label in labels]
    else:
        runs: list[list[int]] = []
        for label in sorted(int(label) for label in labels):
            if runs and label == runs[-1][-1] + 1:
                runs[-1].append(label)
            else:
                runs.append([label])
        # Two consecutive labels stay separate.
        parts = [
            part
            for run in runs
            for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(label) for label in run])
        ]
    return ", ".join(parts) if len(parts) <= _MAX_CLASS_RANGES else f"{len(labels)} classes"


def round_line(row: Row, rounds: int) -> str:
    """Format a round as one line, without the quantities that the row lacks.

    Example:
        >>> row = {"round": 2, "accuracy/mean": 0.913, "delta/avg": 0.0021, "delta/worst": -0.01}
        >>> round_line(row, rounds=5)
        'round 2/5  accuracy 0.9130  delta avg +0.0021 worst -0.0100'
    """
    parts = [f"round {int(row['round'])}/{rounds}"]
    for key in (key for key in row if key.count("/") == 1 and key.endswith("/mean")):
        if f"delta/{key.removesuffix('/mean')}/avg" in row:
            continue  # not the primary metric
        metric = metric_spec(key.removesuffix("/mean"))
        parts.append(f"{metric.name} {metric.text(row[key])}")
        deltas = {name: row[f"delta/{name}"] for name in ("avg", "worst") if f"delta/{name}" in row}
        if deltas:
            parts.append(" ".join(["delta", *(f"{name} {metric.difference_text(d)}" for name, d in deltas.items())]))
    return "  ".join(parts)


class PlainConsole(Console):
    """Console that prints text unchanged.

    Names of clients, columns and files may have brackets and colons. It stops printing when its pipe closes, as in
    `fit ... | head`.

    Args:
        **options: Options of a `rich.console.Console`.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def on_broken_pipe(self) -> None:
        """Print nothing more."""
        self.quiet = True
        # Python flushes standard output at exit, which would fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Observer and context manager that shows the progress of a run.

    On a terminal, a bar shows round, client, phase, elapsed and remaining time until the end of the run. Standard
    output gets the lines of the rounds only; warnings go to standard error, one line each.

    Args:
        console: Console to write to; None is standard output.
        quiet: Print warnings only.
        clients: Each client in words, such as `client 0` or `site 'cleveland'`. Default: their numbers.
    """

    def __init__(
        self, console: PlainConsole | None = None, *, quiet: bool = False, clients: Sequence[str] | None = None
    ) -> None:
        self.clients = clients
        self.console = console if console is not None else PlainConsole()
        self.quiet, self.rounds = quiet, 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_interactive and not quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.fields[work]}", style="dim", markup=False),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
                transient=True,
                refresh_per_second=4,
                # Steps arrive once per phase: the default of 30 s would often hold at most one sample.
                speed_estimate_period=24 * 3600,
                # A standard error that goes to a file is not shown on the terminal.
                redirect_stderr=sys.stderr.isatty(),
            )

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finished()

    def started(self, rounds: int, total_steps: int, done_steps: int = 0) -> None:
        """Start the bar.

        Args:
            rounds: Communication rounds.
            total_steps: Training steps of the run, over all clients and phases.
            done_steps: Steps completed before a resume; they do not count for the speed.
        """
        self.rounds = rounds
        if self._progress is not None:
            self._task = self._progress.add_task(f"round 0/{rounds}", total=total_steps, work="")
            # Progress.advance would count them for the speed.
            self._progress.tasks[0].completed = done_steps
            with exclusive():  # rich replaces sys.stdout, unless another run has
                self._progress.start()

    def finished(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            with exclusive():
                self._progress.stop()

    def logged_at(self, url: str) -> None:
        """Print the address of the run at a logger."""
        if not self.quiet:
            self.console.print(f"logged at {url}", soft_wrap=True)

    def round_started(self, round_idx: int) -> None:
        """Show the number of the round."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"round {round_idx}/{self.rounds}")

    def phase_started(self, client: int, phase: str) -> None:
        """Show the client and its phase."""
        if self._progress is not None and self._task is not None:
            label = f"client {client}" if self.clients is None else self.clients[client]
            self._progress.update(self._task, work=f"{label}: {phase}")

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """Advance by the steps of the phase."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def round_finished(self, row: Row) -> None:
        """Print the line of the round."""
        if not self.quiet:
            self.console.print(round_line(row, self.rounds), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line on standard error."""
        print_warning(text)
