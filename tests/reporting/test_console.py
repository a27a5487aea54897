"""Result tables, lines of rounds, and the live display."""

from __future__ import annotations

from io import StringIO

import pytest

from fedekd.reporting import Display, client_table, result_tables
from fedekd.reporting.console import PlainConsole, _ranges, deployed_table, other_metrics_table
from fedekd.reporting.run_report import client_table as report_table


def rendered(table, **options) -> str:
    console = PlainConsole(file=StringIO(), width=80, **options)
    console.print(table)
    return console.file.getvalue()


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("│┃").split("│")] for line in text.splitlines() if "│" in line]


def test_client_table_has_rows_and_footer(make_summary):
    text = rendered(client_table(make_summary((0.5, 0.75), (0.75, 0.625))))
    assert cells(text) == [
        ["0", "100", "30", "0-2, 4", "0.5000", "0.7500", "+0.2500"],
        ["1", "101", "31", "0-2, 5", "0.7500", "0.6250", "-0.1250"],
        ["mean", "", "", "", "0.6250", "0.6875", "+0.0625"],
        ["worst", "", "", "", "", "0.6250", "-0.1250"],
        ["P10", "", "", "", "", "", "-0.0625"],
    ]
    assert "FedeKD on digits, accuracy" in text
    assert max(map(len, text.splitlines())) <= 80


def test_client_tables_show_the_selected_round(make_summary):
    summary = make_summary((0.5, 0.75), (0.75, 0.625))
    assert "round" not in rendered(client_table(summary))
    for client, selected in zip(summary["clients"], (3, 12), strict=True):
        client["selected_round"] = selected
    rows = cells(rendered(client_table(summary)))
    assert [row[-1] for row in rows] == ["3", "12", "", "", ""]
    assert report_table(summary)["round"].tolist() == [3, 12]


@pytest.mark.parametrize(("metric", "harmed"), [("accuracy", "-0.125"), ("rmse", "+0.25")])
def test_client_table_harm_is_red(make_summary, metric, harmed):
    summary = make_summary((0.5, 0.75), (0.75, 0.625), metric=metric)
    text = rendered(client_table(summary), force_terminal=True, color_system="standard")
    red = [part.partition("\x1b[0m")[0] for part in text.split("\x1b[31m")[1:]]
    assert {float(part) for part in red if part.strip()} >= {float(harmed)}
    assert all((float(part) < 0) == (metric == "accuracy") for part in red if part.strip())


def test_client_table_of_regression_has_p90_and_no_classes(make_summary):
    summary = make_summary((1234.5, 0.00123), metric="rmse")
    for client in summary["clients"]:
        del client["classes"]
    text = rendered(client_table(summary))
    assert "classes" not in text
    assert cells(text)[0] == ["0", "100", "30", "1234", "0.00123", "-1234"]
    assert cells(text)[-1][0] == "P90"


def with_recall(summary, names):
    """Add the recall of each class as other metrics."""
    summary["class_names"] = names
    value = {"score": 0.75, "local": 0.5, "delta": 0.25}
    stats = {"mean": 0.75, "worst": 0.75, "delta": {"avg": 0.25, "worst": 0.25, "p10": 0.25}}
    summary["metrics"] = {f"recall/{label}": stats for label in range(len(names))}
    for client in summary["clients"]:
        client |= {"classes": [0, 1], "metrics": dict.fromkeys(summary["metrics"], value)}
    return summary


def with_deployed(summary):
    """Add the decisions of do no harm."""
    rule = {"rule": "certified", "confidence": 0.95, "margin": 0.0}
    summary["deployed"] = {"rule": rule, "delta": summary["delta"]}
    for client in summary["clients"][1:]:
        client |= {"deployed": "federated", "samples": 120, "worse": 10, "better": 11, "p_value": 0.0123}
    return summary


def test_result_tables_names_with_brackets_are_no_markup(make_summary):
    summary = with_deployed(with_recall(make_summary((0.5, 0.75), (0.75, 0.625)), ["[/red]x", "[bold]"]))
    summary |= {"method": "[/dim]m", "dataset": "[/i]d"}
    for client, name in zip(summary["clients"], ("[/b]one", "[red]two"), strict=True):
        client["name"] = name
    clients, others, deployed = (rendered(table) for table in result_tables(summary, ["accuracy"]))
    assert all(text in clients for text in ("[/dim]m on [/i]d", "[/b]one", "[red]two", "[/red]x", "[bold]"))
    assert all(text in others for text in ("[/dim]m on [/i]d", "[/b]one", "[red]two", "[/red]x", "[bold]"))
    assert "[/b]one" in deployed


def test_client_table_of_real_targets_on_sites_has_no_column_of_classes(make_summary):
    summary = make_summary((1234.5, 0.00123), metric="rmse")
    summary["clients"][0]["classes"] = []
    assert "classes" not in rendered(client_table(summary))


@pytest.mark.parametrize("count", [4, 12])
def test_other_metrics_table_in_80_columns_shows_whole_headings(make_summary, count):
    names = [f"class{number}-{'abcdefghij' * 2}" for number in range(count)]
    text = rendered(other_metrics_table(with_recall(make_summary((0.5, 0.75), (0.75, 0.625)), names)))
    assert "…" not in text
    assert all(line[-1] in "┓┃┩│┤┘" for line in text.splitlines()[1:] if line)
    assert all(f"{number}-" in text for number in range(count))


def test_deployed_table_long_names_fold_into_few_rows_and_cut_no_number(make_summary):
    summary = with_deployed(make_summary((0.5, 0.75), (0.75, 0.625)))
    for number, client in enumerate(summary["clients"]):
        client["name"] = f"{number} {'University Hospital of Basel ' * 2}"[:55]
    text = rendered(deployed_table(summary))
    assert "…" not in text
    assert all(number in text for number in ("0.0123", "federated", "120", "-0.1250", "+0.2500"))
    assert all(line[-1] in "┓┃┩│┤┘" for line in text.splitlines()[1:] if line)
    assert len(text.splitlines()) <= 18


def test_deployed_table_long_names_of_equal_ends_stay_different(make_summary):
    summary = with_deployed(make_summary((0.5, 0.75), (0.75, 0.625)))
    for number, client in enumerate(summary["clients"]):
        client["name"] = f"{'x' * 20}{number}{'x' * 20}"
    text = "".join(row[0] for row in cells(rendered(deployed_table(summary))))
    assert "x0x" in text
    assert "x1x" in text


def test_ranges_joins_consecutive_classes():
    assert _ranges([3, 1, 0, 2, 7, 5, 8]) == "0-3, 5, 7, 8"
    assert _ranges([]) == ""
    assert _ranges(["cat", "dog"]) == "cat, dog"
    assert _ranges(list(range(0, 100, 2))) == "50 classes"
    assert _ranges(list(range(100))) == "0-99"


def run(display: Display) -> None:
    with display:
        display.started(rounds=2, total_steps=50, done_steps=10)
        for round_idx in (1, 2):
            display.round_started(round_idx)
            display.phase_started(3, "distil private to proxy")
            display.phase_finished(3, "distil private to proxy", 20)
            display.round_finished(
                {"round": round_idx, "accuracy/mean": 0.913, "delta/avg": 0.0021, "delta/worst": -0.01}
            )
        display.warn("client 3 was\nmissing [from round 2]")


def test_display_without_terminal_prints_one_line_per_round(capsys):
    console = PlainConsole(file=StringIO(), force_terminal=False, width=30)
    run(Display(console))
    line = "round {}/2  accuracy 0.9130  delta avg +0.0021 worst -0.0100\n"
    assert console.file.getvalue() == line.format(1) + line.format(2)
    assert capsys.readouterr() == ("", "warning: client 3 was missing [from round 2]\n")


def test_display_quiet_prints_warnings_only(capsys):
    console = PlainConsole(file=StringIO(), force_terminal=True, force_interactive=True)
    run(Display(console, quiet=True))
    assert console.file.getvalue() == ""
    assert capsys.readouterr() == ("", "warning: client 3 was missing [from round 2]\n")


def test_display_on_terminal_shows_a_bar_and_removes_it(capsys):
    console = PlainConsole(file=StringIO(), force_terminal=True, force_interactive=True, width=120)
    display = Display(console)
    run(display)
    text = console.file.getvalue()
    assert "round 1/2  accuracy 0.9130" in text
    assert "client 3: distil private to proxy" in text
    assert "50/50" in text
    assert text.endswith("\x1b[1A\x1b[2K")  # the bar's line is erased at the end
    assert capsys.readouterr().err == "warning: client 3 was missing [from round 2]\n"


def test_display_completed_steps_do_not_count_for_the_speed():
    console = PlainConsole(file=StringIO(), force_terminal=True, force_interactive=True)
    with Display(console) as display:
        display.started(rounds=2, total_steps=100, done_steps=60)
        task = display._progress.tasks[0]
        assert (task.completed, task.speed) == (60, None)
        display.phase_finished(0, "train", 10)
        assert task.completed == 70
        assert not task.speed


def test_display_row_without_scores_prints_a_line():
    console = PlainConsole(file=StringIO())
    display = Display(console)
    display.started(rounds=5, total_steps=1)
    display.round_finished({"round": 4, "comm/bytes_up": 3})
    assert console.file.getvalue() == "round 4/5\n"


def test_display_stops_when_a_run_fails():
    console = PlainConsole(file=StringIO(), force_terminal=True, force_interactive=True)
    display = Display(console)

    def fail():
        with display:
            display.started(rounds=2, total_steps=10)
            display.round_started(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not display._progress.live.is_started
    assert console.file.getvalue().endswith("\x1b[2K")
