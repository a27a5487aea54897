"""Report of finished runs: settings, clients, Delta, rounds, commands."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from fedekd.metrics import METRICS
from fedekd.reporting.document import Picture, Section
from fedekd.reporting.figures import delta_per_client, gate_weights, score_per_round
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

#: Settings with a column of their own, or without meaning in a comparison of runs.
_SHOWN = ("method.class_path", "data.dataset", "data.partition", "data.alpha", "rounds", "seed")


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        name: Folder, as printed.
        command: Command that repeats the run.
        settings: Options that differ from their defaults, by dotted name.
        partition: How clients were made from the data; empty if they are its sites.
        summary: Content of `summary.json`.
        history: Rows of `metrics.csv`.
    """

    name: str
    command: str
    settings: Mapping[str, Any]
    partition: str
    summary: Summary
    history: Sequence[Row]


def run_sections(runs: Sequence[Run]) -> list[Section]:
    """Return the sections: all runs, each run, and the commands to repeat them.

    Args:
        runs: At least one run.
    """
    return [
        Section("runs", "Runs", tables={"": run_table(runs)}, data={"runs": run_table(runs)}),
        *(_run_section(f"run{index}", run) for index, run in enumerate(runs, start=1)),
        Section("repeat", "Repeat the runs", code=[run.command for run in runs]),
    ]


def run_table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return one row per run: method, data, scores, Delta, differing settings."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name not in _SHOWN)
    differing = [name for name in names if len({str(run.settings.get(name)) for run in runs}) > 1]
    rows = []
    for run in runs:
        summary, metric = run.summary, METRICS[run.summary["metric"]]
        delta = summary["delta"]
        row = {"run": run.name, "method": summary["method"], "data": summary["dataset"]}
        row |= {"partition": run.partition} if any(other.partition for other in runs) else {}
        row |= {"clients": len(summary["clients"]), "rounds": summary["rounds"], "seed": summary["seed"]}
        row |= {f"mean {metric.title}": metric.text(summary["mean"]), "local": metric.text(summary["local_mean"])}
        row |= {f"Delta {name}": metric.difference_text(delta[name]) for name in ("avg", "worst", metric.tail)}
        for score, difference, *heads in references_of(summary):
            row |= {heads[0]: metric.text(summary[f"{score}_mean"])}
            row |= {
                f"{heads[1]} {name}": metric.difference_text(summary[difference][name]) for name in ("avg", "worst")
            }
        if differing:
            own = (f"{name} {run.settings[name]}" for name in differing if name in run.settings)
            row["settings that differ"] = ", ".join(own) or "defaults"
        rows.append(row)
    return pd.DataFrame(rows).fillna("")


def client_table(summary: Summary) -> pd.DataFrame:
    """Return one row per client: data, scores, Delta, deployed round and model.

    Args:
        summary: Content of `summary.json`.
    """
    metric = METRICS[summary["metric"]]
    labels = summary.get("class_names")
    rows = []
    for client in summary["clients"]:
        classes = [labels[label] if labels else str(label) for label in client["classes"]]
        row = {"site" if "name" in client else "client": client_title(client), "classes": ", ".join(classes)}
        row |= {"train": client["train"], "test": client["test"]}
        row |= {"local": metric.text(client["local"]), metric.title: metric.text(client["score"])}
        row["Delta"] = metric.difference_text(client["delta"])
        for score, difference, *heads in references_of(summary):
            row |= {heads[0]: metric.text(client[score]), heads[1]: metric.difference_text(client[difference])}
        if "selected_round" in client:
            row["round"] = client["selected_round"]
        if "deployed" in summary:
            p_value = client.get("p_value")
            # Without a comparison a client deploys the federated model.
            row |= {"deployed": client.get("deployed", "federated"), "compared on": client.get("samples", 0)}
            row["p"] = "" if p_value is None else f"{p_value:.2g}"
            if any("deciding_samples" in each for each in summary["clients"]):
                row["samples to decide"] = _deciding_text(client)
        rows.append(row)
    return pd.DataFrame(rows)


def _deciding_text(client: Mapping[str, Any]) -> str:
    """Return how many samples would have deployed the federated model."""
    if client.get("deployed") != "local" or "deciding_samples" not in client:
        return ""
    if client["deciding_samples"] is not None:
        return f"{client['deciding_samples']:,}"
    return "none found"


def other_metrics_table(summary: Summary) -> pd.DataFrame:
    """Return one row per metric but the primary one: means, Delta, clients.

    Args:
        summary: Content of `summary.json` with `metrics`.
    """
    rows = []
    for name, values in summary["metrics"].items():
        metric, delta = metric_spec(name), values["delta"]
        row: dict[str, Any] = {"metric": value_title(name, summary), "clients": values["clients"]}
        row |= {"mean": _text(metric.text, values["mean"]), "local": _text(metric.text, values["local_mean"])}
        for part in ("avg", "worst"):
            row[f"Delta {part}"] = _text(metric.difference_text, delta[part])
        row["Delta P10/P90"] = _text(metric.difference_text, delta[metric.tail])
        rows.append(row)
    return pd.DataFrame(rows)


def _text(form: Callable[[float], str], value: float | None) -> str:
    """Return a value as text; empty where it is undefined."""
    return "" if value is None else form(value)


def _run_section(name: str, run: Run) -> Section:
    summary, metric = run.summary, METRICS[run.summary["metric"]]
    direction = "higher" if metric.higher_is_better else "lower"
    delta, tail = summary["delta"], metric.tail
    harmed = [client for client in summary["clients"] if is_harm(client["delta"], metric.name)]
    text = [
        f"{metric.title[0].upper()}{metric.title[1:]}: mean {metric.text(summary['mean'])}, local baseline"
        f" {metric.text(summary['local_mean'])} ({direction} is better). Delta: average"
        f" {metric.difference_text(delta['avg'])}, worst client {metric.difference_text(delta['worst'])}, {tail}"
        f" {metric.difference_text(delta[tail])}. {len(harmed)} of {len(summary['clients'])} clients are worse than"
        f" their local baseline. Time {summary['seconds']:.0f} s, upload {summary['bytes_up'] / 1e6:.1f} MB, download"
        f" {summary['bytes_down'] / 1e6:.1f} MB."
    ]
    clients = client_table(summary)
    tables = {"Clients": clients}
    if summary.get("metrics"):
        tables["Other metrics"] = other_metrics_table(summary)
    if "deployed" in summary:
        deployed = summary["deployed"]
        if rows := candidate_rows(summary):
            tables["Candidates: p-values in the order of the tests"] = pd.DataFrame(rows)
        text.append(
            f"Do no harm ({rule_note(deployed['rule'])}):"
            f" {deployed['federated']:.0%} of the clients deploy the federated model. With the deployed models: mean"
            f" {metric.text(deployed['mean'])}, Delta average {metric.difference_text(deployed['delta']['avg'])}, worst"
            f" client {metric.difference_text(deployed['delta']['worst'])}."
        )
    for kind, caption in (
        ("exits", "Exits: all images at one exit"),
        ("budgets", "Budgets: early exits at a mean cost"),
    ):
        if summary.get(kind):
            points = pd.DataFrame(summary[kind])
            if kind == "budgets":
                points = points[(4 * points["budget"]) % 1 == 0]  # quarters only
            first = points.columns[0]
            tables[caption] = pd.DataFrame(
                {
                    first: [f"{value:.0%}" if kind == "budgets" else value for value in points[first]],
                    "FLOPs": points["cost"].map("{:.1%}".format),
                    metric.title: points["accuracy"].map(metric.text),
                }
            )
    settings = [{"setting": option, "value": value} for option, value in run.settings.items()]
    tables["Settings that differ from their defaults"] = pd.DataFrame(settings)
    pictures = [
        Picture(f"{name}-delta", f"{run.name}: Delta per client.", delta_per_client(summary)),
        Picture(f"{name}-rounds", f"{run.name}: {metric.title} per round.", score_per_round(run.history, summary)),
    ]
    if (gate := gate_weights(run.history, summary)) is not None:
        pictures.append(Picture(f"{name}-gate", f"{run.name}: trust weight of the gate per round.", gate))
    title = f"{summary['method']} on {summary['dataset']} ({run.name})"
    return Section(name, title, text, tables=tables, pictures=pictures, data={f"{name}-clients": clients})
