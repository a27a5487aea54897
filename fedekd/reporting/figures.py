"""The figures of a run. Each function returns a Figure and shows nothing; pyplot's state is never touched."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedekd.atomic import atomic_file
from fedekd.reporting.rows import Row, Summary, client_series, harmed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

# Okabe and Ito's palette, which stays apart under every common colour blindness.
BLUE, VERMILLION, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#7F7F7F"
CLIENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#000000")
MARKERS = "os^Dv<>P"

_SCORES = {
    "accuracy": ("accuracy", "fraction of test samples"),
    "rmse": ("RMSE", "unit of the target"),
}


def partition(counts: ArrayLike, class_names: Sequence[str] | None = None) -> Figure:
    """How many samples of each class each client holds, every count readable.

    Args:
        counts: Samples, integers of shape (clients, classes).
        class_names: Labels of the columns; None for 0, 1, ...

    Returns:
        A heat map that grows with clients and classes; the right margin tells each client's total.

    Raises:
        ValueError: If `counts` has no two dimensions, or `class_names` does not match them.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    table = np.asarray(counts)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"counts must have shape (clients, classes), both above 0, got {table.shape}")
    clients, classes = table.shape
    names = [str(label) for label in range(classes)] if class_names is None else [str(name) for name in class_names]
    if len(names) != classes:
        raise ValueError(f"{len(names)} class names for {classes} classes")

    cell_width = 0.2 + 0.085 * max(2, len(str(table.max())))
    slanted = max(map(len, names)) * 0.085 > cell_width
    axes_height = clients * (0.3 if clients <= 20 else 0.21)
    figure, axes = _figure(max(4.0, classes * cell_width + 2.2), axes_height + (1.9 if slanted else 1.3))
    # The square root keeps small counts, which decide how skewed a client is, apart from none.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, int(table.max())))
    axes.imshow(table, cmap=colormaps["Blues"], norm=norm, aspect="auto")
    for client, class_ in np.ndindex(clients, classes):
        count = int(table[client, class_])
        colour = "white" if norm(count) > 0.6 else (BLACK if count else GREY)
        axes.text(class_, client, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(classes), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axes.set_yticks(range(clients), [str(client) for client in range(clients)])
    # In a tall table the names are wanted at both ends.
    axes.tick_params(length=0, labelsize=8, labeltop=clients > 20 and not slanted)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(clients + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#D9D9D9", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    totals = axes.secondary_yaxis("right")
    totals.set_yticks(range(clients), [str(total) for total in table.sum(axis=1)])
    totals.tick_params(length=0, labelsize=8)
    totals.set_ylabel("total")
    axes.set(title="Samples per client and class", xlabel="class", ylabel="client")
    return figure


def delta_per_client(summary: Summary) -> Figure:
    """Delta, the method's score minus Local's, client by client: vermillion where it harms, blue where not.

    Args:
        summary: What `summary.json` holds.

    Returns:
        A bar a client, with lines at the average, the worst and zero.
    """
    metric, clients, delta = summary["metric"], summary["clients"], summary["delta"]
    name, unit = _SCORES[metric]
    values = [float(client["delta"]) for client in clients]
    places = range(len(clients))
    figure, axes = _figure(min(max(5.5, 0.32 * len(clients) + 2.0), 16.0), 4.2)
    colours = [VERMILLION if harmed(value, metric) else BLUE for value in values]
    bars = axes.bar(places, values, color=colours, width=0.7)
    if len(clients) <= 12:
        axes.bar_label(bars, fmt="%+.3f", fontsize=8, padding=3)
        axes.margins(y=0.12)
    axes.axhline(0.0, color=BLACK, linewidth=0.8)
    average = axes.axhline(delta["avg"], color=BLACK, linewidth=1.4, linestyle="--")
    worst = axes.axhline(delta["worst"], color=BLACK, linewidth=1.4, linestyle=":")
    step = -(-len(clients) // 50)
    axes.set_xticks(places[::step], [str(client["client"]) for client in clients][::step], fontsize=8)
    axes.set_xlim(-0.8, len(clients) - 0.2)
    axes.set(
        title=f"Delta per client: {summary['method']} minus Local, {summary['dataset']}",
        xlabel="client",
        ylabel=f"Delta of {name} ({unit})",
    )
    labels = [f"average {delta['avg']:+.4f}", f"worst {delta['worst']:+.4f}"]
    figure.legend([average, worst], labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def score_per_round(history: Sequence[Row], summary: Summary) -> Figure:
    """The score over the rounds: each client faint, the mean bold, Local's mean dashed.

    Args:
        history: The rows of the rounds.
        summary: What `summary.json` holds.
    """
    metric = summary["metric"]
    name, unit = _SCORES[metric]
    figure, axes = _figure(6.8, 4.4)
    series = client_series(history, metric)
    for rounds, values in series.values() if len(series) > 1 else ():
        axes.plot(rounds, values, color=BLUE, alpha=0.3, linewidth=1.0, marker=".", markersize=4, label="a client")
    mean = [(int(row["round"]), row[f"{metric}/mean"]) for row in history if f"{metric}/mean" in row]
    if mean:
        axes.plot(*zip(*mean, strict=True), color=BLUE, linewidth=2.6, marker="o", markersize=5, label="mean")
    axes.axhline(summary["local_mean"], color=BLACK, linewidth=1.4, linestyle="--", label="mean of Local")
    axes.set(
        title=f"{name[0].upper() + name[1:]} per round: {summary['method']}, {summary['dataset']}",
        xlabel="communication round",
        ylabel=f"{name} ({unit})",
    )
    _round_axis(axes, [int(row["round"]) for row in history])
    _legend_below(figure, axes)
    return figure


def gate_weights(history: Sequence[Row]) -> Figure | None:
    """How far each client's private model trusts the proxy: the mean trust weight per round (Eq. 3).

    The mean is about 1/2 whatever the proxy is worth, since the gate ranks within a batch; the band, one standard
    deviation within a batch to either side, shows how decided the ranking is.

    Up to eight clients are told apart by colour and marker; of more, only the mean stands out.

    Args:
        history: The rows of the rounds.

    Returns:
        The figure, or None if the method has no gate.
    """
    series = client_series(history, "gate/weight_mean")
    mean = [(int(row["round"]), row["gate/weight_mean"]) for row in history if "gate/weight_mean" in row]
    gated = [row for row in history if {"gate/weight_mean", "gate/weight_std"} <= row.keys()]
    if not series and not mean:
        return None
    figure, axes = _figure(6.8, 4.4)
    if gated:
        low = [row["gate/weight_mean"] - row["gate/weight_std"] for row in gated]
        high = [row["gate/weight_mean"] + row["gate/weight_std"] for row in gated]
        label = "spread within a batch"
        axes.fill_between([row["round"] for row in gated], low, high, color=GREY, alpha=0.2, linewidth=0, label=label)
    for place, (client, (rounds, values)) in enumerate(series.items()):
        if len(series) <= len(CLIENT_COLOURS):
            style: dict[str, Any] = {
                "color": CLIENT_COLOURS[place],
                "marker": MARKERS[place],
                "linewidth": 1.4,
            }
            label = f"client {client}"
        else:
            style, label = {"color": BLUE, "alpha": 0.3, "marker": ".", "linewidth": 1.0}, "a client"
        axes.plot(rounds, values, markersize=4, label=label, **style)
    if mean and len(series) != 1:
        axes.plot(*zip(*mean, strict=True), color=BLACK, linewidth=2.6, label="mean")
    axes.axhline(0.5, color=GREY, linewidth=1.2, linestyle="--", label="1/2: no preference")
    axes.set(
        title="Trust in the proxy per round",
        xlabel="communication round",
        ylabel="mean trust weight (0 to 1)",
        ylim=(-0.02, 1.02),
    )
    _round_axis(axes, [int(row["round"]) for row in history])
    _legend_below(figure, axes)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG, 150 dots an inch, atomically; the same figure gives the same bytes."""
    with atomic_file(path) as file:
        # Matplotlib would otherwise write its version into the file.
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure of so many inches with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _round_axis(axes: Axes, rounds: Iterable[int]) -> None:
    """Whole rounds only, with room around a single one."""
    from matplotlib.ticker import MaxNLocator

    drawn = list(rounds) or [1]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    room = max(0.5 if min(drawn) == max(drawn) else 0.15, 0.03 * (max(drawn) - min(drawn)))
    axes.set_xlim(min(drawn) - room, max(drawn) + room)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """A legend under the axes, one entry a label."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=min(5, len(entries)),
        frameon=False,
        fontsize=9,
    )
