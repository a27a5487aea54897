"""Figures of a run, without pyplot and its global state."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from fedekd.atomic import atomic_file
from fedekd.errors import shorten
from fedekd.reporting.rows import Row, Summary, client_series, client_title, client_titles, is_harm, metric_spec

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import ArrayLike

# Palette of Okabe and Ito, which is distinguishable with all common colour vision deficiencies.
BLUE, VERMILLION, BLACK, GREY = "#0072B2", "#D55E00", "#000000", "#7F7F7F"
CLIENT_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#8C8C00", "#000000")
MARKERS = "os^Dv<>P"

_LONGEST_LABEL = 24  # characters of a name at an axis

#: More clients than these are drawn as a distribution: a mark for each would be neither legible nor fast.
MOST_CLIENTS = 100


def partition(
    counts: ArrayLike, class_names: Sequence[str] | None = None, client_names: Sequence[str] | None = None
) -> Figure:
    """Draw the number of samples per client and class.

    Args:
        counts: Samples, integers, shape (clients, classes).
        class_names: Labels of the columns; None is 0, 1, ...
        client_names: Labels of the rows; None is 0, 1, ...

    Returns:
        Heat map that grows with clients and classes, with the counts in its cells and the total per client on the
        right; for more than `MOST_CLIENTS` clients of a fixed height, with a colour scale in their place.

    Raises:
        ValueError: If `counts` is not two-dimensional, or the names do not match it.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    table = np.asarray(counts)
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(f"counts: expected shape (clients, classes), both at least 1, got {table.shape}")
    clients, classes = table.shape
    names = _names("class_names", classes, class_names)
    rows = _names("client_names", clients, client_names)

    cell_width = 0.2 + 0.085 * max(2, len(str(table.max())))
    slanted = max(map(len, names)) * 0.085 > cell_width
    are_many = clients > MOST_CLIENTS
    axes_height = 8.0 if are_many else clients * (0.3 if clients <= 20 else 0.21)
    margin = 2.2 if client_names is None else 2.2 + 0.075 * max(0, max(map(len, rows)) - 3)
    figure, axes = _figure(max(1.8 + margin, classes * cell_width + margin), axes_height + (1.9 if slanted else 1.3))
    # The square root makes small counts, which decide the skew of a client, differ visibly from 0.
    norm = PowerNorm(0.5, vmin=0, vmax=max(1, int(table.max())))
    image = axes.imshow(table, cmap=colormaps["Blues"], norm=norm, aspect="auto")
    row = _client_label(client_names)
    axes.set_xticks(range(classes), names, rotation=45 if slanted else 0, ha="right" if slanted else "center")
    axes.set(title=f"Samples per {row} and class", xlabel="class", ylabel=row)
    if are_many:
        figure.colorbar(image, label="samples")
        axes.tick_params(labelsize=8)
        return figure
    for client, class_ in np.ndindex(clients, classes):
        count = int(table[client, class_])
        colour = "white" if norm(count) > 0.6 else (BLACK if count else GREY)
        axes.text(class_, client, str(count), ha="center", va="center", fontsize=8, color=colour)
    axes.set_yticks(range(clients), rows)
    # A tall table has the names at both ends.
    axes.tick_params(length=0, labelsize=8, labeltop=clients > 20 and not slanted)
    axes.set_xticks(np.arange(classes + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(clients + 1) - 0.5, minor=True)
    axes.grid(which="minor", color="#D9D9D9", linewidth=0.6)
    axes.tick_params(which="minor", length=0)
    totals = axes.secondary_yaxis("right")
    totals.set_yticks(range(clients), [str(total) for total in table.sum(axis=1)])
    totals.tick_params(length=0, labelsize=8)
    totals.set_ylabel("total")
    return figure


def delta_per_client(summary: Summary) -> Figure:
    """Draw Delta per client: vermillion where it is harm, blue elsewhere.

    Args:
        summary: Content of `summary.json`.

    Returns:
        One bar per client, with lines at the average, the worst and zero. More than `MOST_CLIENTS` are in the order of
        Delta, the worst first.
    """
    metric, clients, delta = summary["metric"], summary["clients"], summary["delta"]
    values = [_number(client["delta"]) for client in clients]
    are_many = len(clients) > MOST_CLIENTS
    if are_many:
        defined = sorted(value for value in values if not math.isnan(value))
        values = defined if metric_spec(metric).higher_is_better else defined[::-1]
    positions = range(len(values))
    figure, axes = _figure(min(max(5.5, 0.32 * len(clients) + 2.0), 16.0), 4.2)
    colours = [VERMILLION if is_harm(value, metric) else BLUE for value in values]
    if are_many:
        axes.vlines(positions, 0.0, values, colors=colours, linewidth=1.0)
    else:
        bars = axes.bar(positions, values, color=colours, width=0.7)
    if len(clients) <= 12:
        axes.bar_label(bars, fmt="%+.3f", fontsize=8, padding=3)
        axes.margins(y=0.12)
    axes.axhline(0.0, color=BLACK, linewidth=0.8)
    average = axes.axhline(_number(delta["avg"]), color=BLACK, linewidth=1.4, linestyle="--")
    worst = axes.axhline(_number(delta["worst"]), color=BLACK, linewidth=1.4, linestyle=":")
    step = -(-len(clients) // 50)
    names = [_tick_label(title) for title in client_titles(summary)]
    has_names = any("name" in client for client in clients)
    row = _client_label(names if has_names else None)
    slanted = has_names and max(map(len, names)) * 0.085 > max(0.32, 4.2 / len(clients))
    if not are_many:
        axes.set_xticks(
            positions[::step],
            names[::step],
            fontsize=8,
            rotation=45 if slanted else 0,
            ha="right" if slanted else "center",
        )
    axes.set_xlim(-0.8, len(values) - 0.2)
    axes.set_title(
        f"Delta per {row}: {summary['method']} minus local baseline, {summary['dataset']}", fontsize=11, wrap=True
    )
    axes.set(
        xlabel=f"{row}s in the order of Delta, the worst first" if are_many else row,
        ylabel=f"Delta of {_axis_label(metric)}",
    )
    labels = [f"average {_number(delta['avg']):+.4f}", f"worst {_number(delta['worst']):+.4f}"]
    figure.legend([average, worst], labels, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    return figure


def score_per_round(history: Sequence[Row], summary: Summary) -> Figure:
    """Draw the score per round.

    Clients are faint, or bands if they are more than `MOST_CLIENTS`; their mean is bold, and the mean of the local
    baselines is dashed.

    Args:
        history: Rows of the rounds.
        summary: Content of `summary.json`.
    """
    metric = summary["metric"]
    title = metric_spec(metric).title
    figure, axes = _figure(6.8, 4.4)
    series = client_series(history, metric, client_titles(summary))
    if len(series) > MOST_CLIENTS:
        _draw_bands(axes, series)
    for rounds, values in series.values() if 1 < len(series) <= MOST_CLIENTS else ():
        axes.plot(rounds, values, color=BLUE, alpha=0.3, linewidth=1.0, marker=".", markersize=4, label="one client")
    mean = [(int(row["round"]), row[f"{metric}/mean"]) for row in history if f"{metric}/mean" in row]
    if mean:
        axes.plot(*zip(*mean, strict=True), color=BLUE, linewidth=2.6, marker="o", markersize=5, label="mean")
    local_mean = _number(summary["local_mean"])
    axes.axhline(local_mean, color=BLACK, linewidth=1.4, linestyle="--", label="mean of the local baselines")
    axes.set(
        title=f"{title[0].upper() + title[1:]} per round: {summary['method']}, {summary['dataset']}",
        xlabel="communication round",
        ylabel=_axis_label(metric),
    )
    _round_axis(axes, [int(row["round"]) for row in history])
    _legend_below(figure, axes)
    return figure


def gate_weights(history: Sequence[Row], summary: Summary | None = None) -> Figure | None:
    """Draw the mean trust weight of the proxy per client and round (Eq. 3).

    The gate ranks samples within a batch, so that the mean is about 1/2 for any proxy. The band of one standard
    deviation within a batch shows how distinct the ranking is.

    Up to eight clients have their own colour and marker; more are drawn faint, and more than `MOST_CLIENTS` as bands.

    Args:
        history: Rows of the rounds.
        summary: Content of `summary.json`, with the names of sites. Default: clients have numbers.

    Returns:
        The figure; None if the method has no gate.
    """
    clients = () if summary is None else summary["clients"]
    series = client_series(history, "gate/weight_mean", [client_title(client) for client in clients])
    named = {str(client["name"]) for client in clients if "name" in client}
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
    if len(series) > MOST_CLIENTS:
        _draw_bands(axes, series)
    for index, (client, (rounds, values)) in enumerate(series.items() if len(series) <= MOST_CLIENTS else ()):
        if len(series) <= len(CLIENT_COLOURS):
            style: dict[str, Any] = {
                "color": CLIENT_COLOURS[index],
                "marker": MARKERS[index],
                "linewidth": 1.4,
            }
            label = client if client in named else f"client {client}"
        else:
            style, label = {"color": BLUE, "alpha": 0.3, "marker": ".", "linewidth": 1.0}, "one client"
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


def evidence(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike]], threshold: float, alarms: Mapping[str, int], title: str
) -> Figure:
    """Draw the evidence of a monitor over the arrivals.

    Args:
        curves: By quantity, numbers of arrivals, shape (m,), and the evidence after them, above 0, shape (m,).
        threshold: Evidence of an alarm.
        alarms: By quantity with an alarm, the number of its arrival.
        title: Title of the figure.
    """
    figure, axes = _figure(8.0, 4.2)
    for index, (name, (arrivals, values)) in enumerate(curves.items()):
        colour = CLIENT_COLOURS[index % len(CLIENT_COLOURS)]
        numbers, height = np.asarray(arrivals), np.asarray(values)
        axes.plot(numbers, height, color=colour, linewidth=1.4, label=_tick_label(name))
        if name in alarms:
            place = int(np.searchsorted(numbers, alarms[name]))
            axes.plot(numbers[place], height[place], color=colour, marker=MARKERS[index % len(MARKERS)], markersize=8)
    axes.axhline(threshold, color=BLACK, linewidth=1.2, linestyle="--", label=f"alarm at {threshold:.4g}")
    axes.set_yscale("log")
    # Evidence far above the threshold would hide all curves below it.
    axes.set_ylim(1e-2, threshold * 1e3)
    axes.set(title=title, xlabel="arrivals", ylabel="evidence (e-value)")
    axes.legend(loc="upper left", fontsize=8, framealpha=0.9)
    return figure


def save(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure as PNG at 150 dots per inch, atomically.

    Equal figures give equal bytes.
    """
    with atomic_file(path) as file, warnings.catch_warnings():
        # Fonts lack glyphs of some scripts, and long names leave little room; the tables have the names.
        for message in ("Glyph", "constrained_layout not applied"):
            warnings.filterwarnings("ignore", message)
        # Leave out matplotlib's version, so that equal figures give equal bytes.
        figure.savefig(file, format="png", dpi=150, metadata={"Software": None})


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """Create a figure of a size in inches with one pair of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _draw_bands(axes: Axes, series: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    """Draw how the values of many clients are distributed in each round."""
    by_round: dict[int, list[float]] = {}
    for rounds, values in series.values():
        for round_idx, value in zip(rounds, values, strict=True):
            if not math.isnan(value):
                by_round.setdefault(round_idx, []).append(value)
    drawn = sorted(by_round)
    for low, high, alpha, label in ((0, 1, 0.12, "all clients"), (0.1, 0.9, 0.2, "80% of the clients")):
        limits = np.array([np.quantile(by_round[round_idx], (low, high)) for round_idx in drawn]).reshape(-1, 2)
        axes.fill_between(drawn, *limits.T, color=BLUE, alpha=alpha, linewidth=0, label=label)


def _names(argument: str, count: int, names: Sequence[str] | None) -> list[str]:
    """Return labels as text: the names, or 0, 1, ...

    Raises:
        ValueError: If the number of names is another one.
    """
    if names is not None and len(names) != count:
        raise ValueError(f"{argument}: expected {count} names, got {len(names)}")
    # A pair of dollar signs would be drawn as a formula.
    return [_tick_label(name) for name in (range(count) if names is None else names)]


def _tick_label(name: object) -> str:
    """Return a name as a label of an axis: short, without formulas."""
    return shorten(str(name), _LONGEST_LABEL).replace("$", r"\$")


def _client_label(names: Sequence[str] | None) -> str:
    """Return the title of an axis of clients."""
    return "client" if names is None else "site"


def _number(value: float | None) -> float:
    """Return NaN, which is not drawn, for an undefined value."""
    return math.nan if value is None else float(value)


def _axis_label(metric: str) -> str:
    """Return the title of a metric with its unit."""
    spec = metric_spec(metric)
    return f"{spec.title} (unit of the {spec.unit})" if spec.unit else spec.title


def _round_axis(axes: Axes, rounds: Iterable[int]) -> None:
    """Set integer ticks and margins of the axis of rounds."""
    from matplotlib.ticker import MaxNLocator

    drawn = list(rounds) or [1]
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    margin = max(0.5 if min(drawn) == max(drawn) else 0.15, 0.03 * (max(drawn) - min(drawn)))
    axes.set_xlim(min(drawn) - margin, max(drawn) + margin)
    axes.grid(axis="y", color="#E5E5E5", linewidth=0.8)
    axes.set_axisbelow(True)


def _legend_below(figure: Figure, axes: Axes) -> None:
    """Place a legend below the axes, with one entry per label."""
    handles, labels = axes.get_legend_handles_labels()
    entries = dict(zip(labels, handles, strict=True))
    # An inch holds about 13 characters of the font; a line and its space take 6.
    fitting = int(13 * figure.get_figwidth()) // (max(map(len, entries)) + 6)
    figure.legend(
        entries.values(),
        entries.keys(),
        loc="outside lower center",
        ncols=max(1, min(5, len(entries), fitting)),
        frameon=False,
        fontsize=9,
    )
