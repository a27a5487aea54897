"""What a run shows while it works, and its table of clients at the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from types import TracebackType

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

from fedekd.reporting.rows import Row, Summary, harmed, tail_name

_SCORE_FORMATS = {"accuracy": ".4f", "rmse": ".4g"}
_MAX_CLASS_RANGES = 8  # more would push the scores off an 80-column terminal


def result_tables(summary: Summary) -> list[Table]:
    """All there is to show of a finished run: `client_table` and, with `do_no_harm`, `deployed_table`."""
    return [client_table(summary), *([deployed_table(summary)] if "deployed" in summary else [])]


def client_table(summary: Summary) -> Table:
    """The outcome client by client, with the means, the worst and the harmful tail below.

    Args:
        summary: What `summary.json` holds. A client's `classes`, the labels it holds, is shown where present.

    Returns:
        A table with the samples, Local's score, the method's score and Delta (method minus Local) of each
        client; a Delta that harms its client is red.
    """
    metric, clients, delta = summary["metric"], summary["clients"], summary["delta"]
    with_classes = any("classes" in client for client in clients)
    table = Table(title=f"{summary['method']} on {summary['dataset']}, {metric}")
    for heading in ("client", "train", "test"):
        table.add_column(heading, justify="right")
    if with_classes:
        table.add_column("classes", overflow="fold")
    for heading in ("Local", summary["method"], "Delta"):
        table.add_column(heading, justify="right", no_wrap=True)

    def score(value: float) -> str:
        return format(value, _SCORE_FORMATS[metric])

    def difference(value: float) -> Text:
        return Text(format(value, "+" + _SCORE_FORMATS[metric]), style="red" if harmed(value, metric) else "")

    def add(name: str, samples: tuple[str, str], classes: str, local: str, method: str, change: Text) -> None:
        table.add_row(name, *samples, *([classes] if with_classes else []), local, method, change)

    for client in clients:
        add(
            str(client["client"]),
            (str(client["train"]), str(client["test"])),
            _ranges(client.get("classes", [])),
            score(client["local"]),
            score(client["score"]),
            difference(client["delta"]),
        )
    table.add_section()
    tail = tail_name(delta)
    add("mean", ("", ""), "", score(summary["local_mean"]), score(summary["mean"]), difference(delta["avg"]))
    add("worst", ("", ""), "", "", score(summary["worst"]), difference(delta["worst"]))
    add(tail.upper(), ("", ""), "", "", "", difference(delta[tail]))
    return table


def deployed_table(summary: Summary) -> Table:
    """Which model each client keeps, on what evidence, and what becomes of Delta.

    Args:
        summary: What `summary.json` holds of a run with `do_no_harm`.
    """
    metric, rule, delta, after = (
        summary["metric"],
        summary["deployed"]["rule"],
        summary["delta"],
        summary["deployed"]["delta"],
    )
    by_class = metric == "accuracy"
    guarantee = f"confidence {rule['confidence']:.12g}, margin {rule['margin']:g}"
    table = Table(title=f"do no harm: {guarantee if rule['rule'] == 'certified' else 'lower loss, no guarantee'}")
    for heading in ("client", "compared on", *(("worse", "better") if by_class else ("gain",)), "p", "deployed"):
        table.add_column(heading, justify="right")
    for heading in ("Delta before", "after"):
        table.add_column(heading, justify="right", no_wrap=True)

    def difference(value: float) -> Text:
        return Text(format(value, "+" + _SCORE_FORMATS[metric]), style="red" if harmed(value, metric) else "")

    for client in summary["clients"]:
        if "deployed" not in client:  # it has taken part in no round, and has nothing to compare
            table.add_row(str(client["client"]), *[""] * (5 if by_class else 4), *[difference(client["delta"])] * 2)
            continue
        evidence = (str(client["worse"]), str(client["better"])) if by_class else (format(client["gain"], "+.4g"),)
        p_value = "" if client["p_value"] is None else f"{client['p_value']:.3g}"
        changes = difference(client["delta"]), difference(client["delta"] if client["deployed"] == "federated" else 0.0)
        table.add_row(str(client["client"]), str(client["samples"]), *evidence, p_value, client["deployed"], *changes)
    table.add_section()
    blank = [""] * (5 if by_class else 4)
    for name, key in (("mean", "avg"), ("worst", "worst"), (tail_name(delta).upper(), tail_name(delta))):
        table.add_row(name, *blank, difference(delta[key]), difference(after[key]))
    return table


def _ranges(labels: Sequence[int | str]) -> str:
    """Class labels in short: runs of integers as ranges; only their number if that is still long."""
    if not all(isinstance(label, int) for label in labels):
        parts = [str(label) for label in labels]
    else:
        runs: list[list[int]] = []
        for label in sorted(int(label) for label in labels):
            if runs and label == runs[-1][-1] + 1:
                runs[-1].append(label)
            else:
                runs.append([label])
        # Two neighbours read better as two labels than as a range.
        parts = [
            part
            for run in runs
            for part in ([f"{run[0]}-{run[-1]}"] if len(run) > 2 else [str(label) for label in run])
        ]
    return ", ".join(parts) if len(parts) <= _MAX_CLASS_RANGES else f"{len(labels)} classes"


def round_line(row: Row, rounds: int) -> str:
    """One round in one line; a quantity the row lacks is left out.

    Example:
        >>> row = {"round": 2, "accuracy/mean": 0.913, "delta/avg": 0.0021, "delta/worst": -0.01}
        >>> round_line(row, rounds=5)
        'round 2/5  accuracy 0.9130  delta avg +0.0021 worst -0.0100'
    """
    parts = [f"round {int(row['round'])}/{rounds}"]
    for metric, style in _SCORE_FORMATS.items():
        if f"{metric}/mean" in row:
            parts.append(f"{metric} {row[f'{metric}/mean']:{style}}")
    style = "+" + _SCORE_FORMATS["rmse" if "rmse/mean" in row else "accuracy"]
    deltas = [f"{name} {row[f'delta/{name}']:{style}}" for name in ("avg", "worst") if f"delta/{name}" in row]
    if deltas:
        parts.append(f"delta {' '.join(deltas)}")
    return "  ".join(parts)


class _LastingConsole(Console):
    """A console that falls silent when its reader has gone (`fit ... | head`), instead of ending the program."""

    def on_broken_pipe(self) -> None:
        self.quiet = True
        # Python flushes standard output at exit, and would fail there again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class Display:
    """Live progress on a terminal; elsewhere one plain line a round. A context manager, and a run's observer.

    On a terminal a bar shows round, client, phase, time spent and time left; it vanishes at the end. Standard
    output gets the lines of the rounds and nothing else; warnings go to standard error, one line each.

    Args:
        console: Where to write; None for standard output.
        quiet: Show warnings only.
    """

    def __init__(self, console: Console | None = None, *, quiet: bool = False) -> None:
        self.console = console if console is not None else _LastingConsole()
        self.quiet, self.rounds = quiet, 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        if self.console.is_interactive and not quiet:
            self._progress = Progress(
                TextColumn("{task.description}"),
                TextColumn("{task.fields[work]}", style="dim"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
                expand=True,
                transient=True,
                refresh_per_second=4,
                # Steps arrive a phase at a time: the default of 30 s would often hold one sample, or none.
                speed_estimate_period=24 * 3600,
                # A standard error that goes to a file is not to be drawn on the terminal.
                redirect_stderr=sys.stderr.isatty(),
            )

    def __enter__(self) -> Display:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finished()

    def started(self, rounds: int, total_steps: int, done_steps: int = 0) -> None:
        """Begin to count.

        Args:
            rounds: Communication rounds of the run.
            total_steps: Training steps of the whole run, over all clients and phases.
            done_steps: Steps that need not be done, as after a resume; they are not taken for speed.
        """
        self.rounds = rounds
        if self._progress is not None:
            self._task = self._progress.add_task(f"round 0/{rounds}", total=total_steps, work="")
            # Progress.advance would also add a sample to the estimate of the speed.
            self._progress.tasks[0].completed = done_steps
            self._progress.start()

    def finished(self) -> None:
        """Take the bar away."""
        if self._progress is not None:
            self._progress.stop()

    def round_started(self, round_idx: int) -> None:
        """Show the round's number; in round 0 nothing has been aggregated yet."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"round {round_idx}/{self.rounds}")

    def phase_started(self, client: int, phase: str) -> None:
        """Show which client does what."""
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, work=f"client {client}: {phase}")

    def phase_finished(self, client: int, phase: str, steps: int) -> None:
        """Advance by the steps of a client's phase."""
        if self._progress is not None and self._task is not None:
            self._progress.advance(self._task, steps)

    def round_finished(self, row: Row) -> None:
        """Print the round's line."""
        if not self.quiet:
            self.console.print(round_line(row, self.rounds), markup=False, highlight=False, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print one line on standard error, quiet or not."""
        with suppress(BrokenPipeError):  # nobody reads it; the run goes on
            print(f"warning: {' '.join(text.split())}", file=sys.stderr, flush=True)
