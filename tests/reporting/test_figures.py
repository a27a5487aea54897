"""Objects that the figures draw."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from matplotlib.colors import same_color

from fedekd.reporting import figures


def lines_by_label(axes):
    labelled: dict[str, list] = {}
    for line in axes.get_lines():
        labelled.setdefault(line.get_label(), []).append(line)
    return labelled


def test_partition_shows_every_count_in_its_cell():
    counts = np.array([[0, 12, 1400], [7, 0, 3]])
    figure = figures.partition(counts, ["cat", "dog", "a long name of a class"])
    (axes,) = figure.axes
    shown = {(text.get_position()): text.get_text() for text in axes.texts}
    assert shown == {(c, k): str(counts[k, c]) for k in range(2) for c in range(3)}
    assert [label.get_text() for label in axes.get_xticklabels()] == ["cat", "dog", "a long name of a class"]
    assert np.array_equal(axes.get_images()[0].get_array(), counts)
    totals = axes.child_axes[0]
    assert [label.get_text() for label in totals.get_yticklabels()] == ["1412", "10"]


@pytest.mark.parametrize("shape", [(1, 2), (6, 10), (40, 10)])
def test_partition_texts_fit_their_cells(shape):
    counts = np.random.default_rng(0).integers(0, 9999, shape)
    figure = figures.partition(counts)
    figure.draw_without_rendering()
    (axes,) = figure.axes
    corners = axes.transData.transform([(0, 0), (1, 1)])
    cell_width, cell_height = np.abs(corners[1] - corners[0])
    boxes = [text.get_window_extent() for text in axes.texts]
    assert max(box.width for box in boxes) < cell_width
    assert max(box.height for box in boxes) < cell_height


@pytest.mark.parametrize(("counts", "names"), [(np.zeros((0, 3)), None), (np.zeros(3), None), ([[1, 2]], ["a"])])
def test_partition_wrong_shape_raises_value_error(counts, names):
    with pytest.raises(ValueError, match=r"^counts: expected shape|^class_names: expected 2 names"):
        figures.partition(counts, names)


@pytest.mark.parametrize(
    ("metric", "colours"),
    [("accuracy", [figures.VERMILLION, figures.BLUE]), ("rmse", [figures.BLUE, figures.VERMILLION])],
)
def test_delta_per_client_harm_has_its_colour(make_summary, metric, colours):
    summary = make_summary((0.75, 0.5), (0.5, 1.0), metric=metric)
    (axes,) = figures.delta_per_client(summary).axes
    assert [bar.get_height() for bar in axes.patches] == [-0.25, 0.5]
    assert [same_color(bar.get_facecolor(), colour) for bar, colour in zip(axes.patches, colours, strict=True)] == [
        True,
        True,
    ]
    worst = -0.25 if metric == "accuracy" else 0.5
    assert sorted(line.get_ydata()[0] for line in axes.get_lines()) == sorted([0.0, 0.125, worst])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1"]


def test_delta_per_client_many_clients_have_fewer_labels_than_bars(make_summary):
    summary = make_summary(*[(0.5, 0.5 + k / 1000) for k in range(100)])
    figure = figures.delta_per_client(summary)
    (axes,) = figure.axes
    assert len(axes.patches) == 100
    figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in axes.get_xticklabels()]
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(("metric", "first"), [("accuracy", -0.4), ("rmse", 0.45)])
def test_figures_of_many_clients_are_distributions(make_summary, metric, first):
    summary = make_summary(*[(0.5, 0.1 + 0.85 * k / 199) for k in range(200)], metric=metric)
    (axes,) = figures.delta_per_client(summary).axes
    heights = [segment[1][1] for segment in axes.collections[0].get_segments()]
    assert (len(heights), heights[0]) == (200, pytest.approx(first))
    assert heights == sorted(heights, reverse=metric == "rmse")
    history = [{"round": 1, **{f"client_{k}/{metric}": k / 199 for k in range(200)}}]
    (axes,) = figures.score_per_round(history, summary).axes
    bands = [band.get_paths()[0].vertices[:, 1] for band in axes.collections]
    assert [(band.min(), band.max()) for band in bands] == [(0.0, 1.0), pytest.approx((0.1, 0.9))]
    (axes, scale) = figures.partition(np.ones((200, 3), dtype=int)).axes
    assert not axes.texts
    assert scale.get_ylabel() == "samples"


def test_score_per_round_draws_clients_mean_and_baseline(make_row, make_summary):
    history = [make_row(round_idx) for round_idx in (1, 2, 3)]
    del history[1]["client_1/accuracy"]  # did not take part
    (axes,) = figures.score_per_round(history, make_summary((0.5, 0.6), (0.7, 0.8))).axes
    lines = lines_by_label(axes)
    assert [list(line.get_xdata()) for line in lines["one client"]] == [[1, 2, 3], [1, 3]]
    assert list(lines["mean"][0].get_ydata()) == [row["accuracy/mean"] for row in history]
    assert lines["mean of the local baselines"][0].get_ydata()[0] == pytest.approx(0.6)
    assert "accuracy" in axes.get_ylabel()


def test_score_per_round_of_regression_skips_rounds_without_scores(make_summary):
    history = [{"round": 1}, {"round": 2, "rmse/mean": 3.0, "client_0/rmse": 3.0, "client_1/rmse": 3.0}]
    (axes,) = figures.score_per_round(history, make_summary((2.0, 3.0), (2.0, 3.0), metric="rmse")).axes
    assert list(lines_by_label(axes)["mean"][0].get_ydata()) == [3.0]
    assert "RMSE" in axes.get_ylabel()
    figures.score_per_round([], make_summary((0.5, 0.6)))  # no rounds: only the baseline


def test_gate_weights_draws_each_client_and_one_half(make_row):
    figure = figures.gate_weights([make_row(1), make_row(2)])
    assert figure is not None
    (axes,) = figure.axes
    lines = lines_by_label(axes)
    assert list(lines["client 1"][0].get_ydata()) == [0.5 + 1 / 90, 0.5 + 2 / 90]
    assert lines["1/2: no preference"][0].get_ydata()[0] == 0.5
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        "client 0",
        "client 1",
        "mean",
        "1/2: no preference",
    ]


def test_gate_weights_many_clients_share_a_legend_entry():
    row = {"round": 1, **{f"client_{k}/gate/weight_mean": 0.5 for k in range(40)}}
    figure = figures.gate_weights([row])
    assert figure is not None
    assert len(lines_by_label(figure.axes[0])["one client"]) == 40
    assert len(figure.legends[0].get_texts()) == 2


def test_gate_weights_without_gate_returns_none(make_row):
    assert figures.gate_weights([{"round": 1, "accuracy/mean": 0.5}]) is None
    assert figures.gate_weights([]) is None


def test_save_equal_figures_give_equal_bytes_without_version(tmp_path, make_row, make_summary):
    history, summary = [make_row(1), make_row(2)], make_summary((0.5, 0.6), (0.7, 0.6))
    figure = figures.score_per_round(history, summary)
    figures.save(figure, tmp_path / "figures" / "a.png")
    figures.save(figure, tmp_path / "figures" / "b.png")
    figures.save(figures.score_per_round(history, summary), tmp_path / "figures" / "c.png")
    first, *others = [(tmp_path / "figures" / name).read_bytes() for name in ("a.png", "b.png", "c.png")]
    assert first.startswith(b"\x89PNG")
    assert others == [first, first]
    assert b"Software" not in first
    assert int.from_bytes(first[16:20], "big") == round(6.8 * 150)
    assert sorted(file.name for file in (tmp_path / "figures").iterdir()) == ["a.png", "b.png", "c.png"]


def test_figures_undefined_scores_are_not_drawn(make_summary):
    summary = make_summary((0.5, 0.6), (0.7, 0.6))
    summary["clients"][0]["delta"] = None
    summary |= {"local_mean": None, "delta": dict.fromkeys(summary["delta"])}
    heights = [bar.get_height() for bar in figures.delta_per_client(summary).axes[0].patches]
    assert np.isnan(heights[0])
    assert heights[1] == pytest.approx(-0.1)
    history = [{"round": 1, f"{summary['metric']}/mean": np.nan}]
    figures.score_per_round(history, summary).draw_without_rendering()


def test_save_long_and_other_names_give_no_warning(tmp_path, make_summary, recwarn):
    names = ["心房颤动" * 5, "x" * 100]
    summary = make_summary((0.5, 0.6), (0.7, 0.6))
    for client, name in zip(summary["clients"], ("y" * 60, "巴塞尔" * 8), strict=True):
        client["name"] = name
    table = figures.partition(np.array([[1, 2], [3, 4]]), names, ["y" * 60, "巴塞尔"])
    for number, figure in enumerate((table, figures.delta_per_client(summary))):
        figures.save(figure, tmp_path / f"{number}.png")
        (axes, *_) = figure.axes
        assert max(len(label.get_text()) for label in axes.get_xticklabels()) <= 24
    assert [str(warning.message) for warning in recwarn] == []
