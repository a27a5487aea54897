"""Sections of the report on the paper."""

from __future__ import annotations

import re
from collections.abc import Sequence

import pandas as pd

from experiments.fedekd_paper import coverage, figures
from experiments.fedekd_paper.comparisons import (
    COMPARED,
    Standing,
    comparison_table,
    gate_comparisons,
    gate_finding,
    method_comparisons,
    standings,
    sweep_values,
)
from experiments.fedekd_paper.datasets import dataset_table
from experiments.fedekd_paper.do_no_harm_results import HarmTable, harm_table, harm_tables
from experiments.fedekd_paper.exits import ExitComparison, exit_comparisons, exit_table
from experiments.fedekd_paper.load import display_name
from experiments.fedekd_paper.missing import missing_runs, missing_table
from experiments.fedekd_paper.published import DEVIATIONS, SEEDS
from experiments.fedekd_paper.statistics import LEVEL, MIN_PAIRS, MIN_SEEDS
from experiments.fedekd_paper.tables import PLANS, paper_cells, table_section, verdict_sentence
from fedekd.benchmark.provenance import mixture
from fedekd.reporting.document import Picture, Section, spread

TITLE = "FedeKD: measured and published results"

#: Parameter of Figures 3 and 4, and its meaning; alpha of both.
SWEEPS = {3: ("beta", "the sharpness of the gate"), 4: ("lambda_kd", "the weight of the distillation")}
SWEEP_ALPHA = 0.5


def paper_report(
    results: pd.DataFrame, grids: Sequence[pd.DataFrame], root: str, sources: Sequence[str]
) -> tuple[list[str], list[Section]]:
    """Return the introduction and the sections of the report.

    Args:
        results: As `load` returns them.
        grids: Results of further grids, as `load_grids` returns them.
        root: Folder of the data files, for Table 3.
        sources: Where the results come from.
    """
    cells = paper_cells(results)
    others = [name for name in results["dataset"].unique() if "," not in name]
    introduction = [
        verdict_sentence(cells),
        f"The paper is arXiv 2605.05553v1; its cells are means over {SEEDS} seeds. Results: {', '.join(sources)}.",
        f"A cell agrees or differs by Welch's t-test at {LEVEL:.0%}, with at least {MIN_SEEDS} seeds. Values are mean ±"
        " standard deviation over seeds, with the number of seeds in parentheses. A star marks the best measured method"
        " among those with the same seeds. ⚑ marks published values that are faulty, for the reason above the table."
        " Delta is the score of a client minus the score of its local baseline (Local). Click a column head to sort.",
        *(
            f"{display_name(name)} deviates from the paper: {text}."
            for name, text in DEVIATIONS.items()
            if name in others
        ),
    ]
    frames = [results, *grids]
    tables = [table_section(plan, cells) for plan in PLANS]
    tables.insert(2, _dataset_section(root, others))
    sections = [
        _gate_section(results),
        *_harm_section([table for frame in frames for table in harm_tables(frame)]),
        *_coverage_section(pd.concat([coverage.coverage_rows(frame) for frame in frames])),
        *_exit_section([comparison for frame in frames for comparison in exit_comparisons(frame)]),
        *tables,
        _figure_section(results, cells),
        _comparison_section(results),
        _missing_section(missing_runs(cells, results)),
        _provenance_section(results),
    ]
    return introduction, sections


def _gate_section(results: pd.DataFrame) -> Section:
    compared = gate_comparisons(results)
    tables = {"The gate, permuted weights and full trust, seed by seed": comparison_table(compared)}
    text, data = gate_finding(compared), {"gate": compared.drop(columns="gain")}
    return Section("gate", "Does the gate's ranking matter?", text, tables=tables if len(compared) else {}, data=data)


def _harm_section(tables: Sequence[HarmTable]) -> list[Section]:
    if not tables:
        return []
    text = (
        "Delta if all clients deploy the federated model, and if a client deploys it only when its holdout split shows"
        " that it is not worse than the local model by the margin or more. The decisions are recomputed for each margin"
        " from the comparisons of the same runs."
    )
    pictures = [
        Picture(
            f"power-{_slug(table.name)}",
            f"{table.name}: exact probability that a client deploys the federated model, by its true gain and the size"
            f" n of the holdout split, where the models differ on {table.differing:.1%} of the samples. Dashed: level"
            " of the test; dotted: minus the margin.",
            figures.power_curves(table),
        )
        for table in tables
    ]
    printed = {f"{table.name}, confidence {table.rule.confidence:g}": harm_table(table) for table in tables}
    data = pd.concat([table.lines.assign(setting=table.name) for table in tables])
    return [Section("harm", "Do no harm", [text], tables=printed, pictures=pictures, data={"do_no_harm": data})]


def _coverage_section(rows: pd.DataFrame) -> list[Section]:
    if rows.empty:
        return []
    text = [
        "Each client calibrates its exits on its own samples: of the samples that exit early at an exit, at most the"
        " target risk may be misclassified. The tables give what this saves on the clients' test splits, and the share"
        " of clients and draws of calibration sets in which the target risk is violated (with its 95% interval), also"
        " for one policy that is calibrated on the samples of all clients."
    ]
    tables = {}
    for name, group in coverage.settings(rows).items():
        text += [f"{name}: {sentence}" for sentence in coverage.findings(group)]
        tables[f"{name}: savings"] = coverage.saving_table(group)
        tables[f"{name}: violations of the target risk"] = coverage.violation_table(group)
    return [Section("coverage", "Exits with a guarantee", text, tables=tables, data={"coverage": rows})]


def _exit_section(comparisons: Sequence[ExitComparison]) -> list[Section]:
    if not comparisons:
        return []
    text = (
        "Means over clients and seeds; costs in parentheses are shares of the plain network's FLOPs. An exit's accuracy"
        " is over all images. For a budget, images exit at the first exit whose confidence reaches a threshold that"
        " keeps to the budget on each client's validation split; the cost is that on the test split. FLOPs saved: at"
        " the accuracy of the best method without exits, over common seeds."
    )
    pictures = [
        Picture(f"exits-{_slug(one.name)}", f"{one.name}: accuracy against FLOPs.", figures.exit_curves(one))
        for one in comparisons
    ]
    tables = {one.name: exit_table(one) for one in comparisons}
    data = pd.concat([one.points.assign(setting=one.name) for one in comparisons])
    findings = [f"{one.name}: {one.finding}" for one in comparisons]
    return [Section("exits", "Early exits", [text, *findings], tables=tables, pictures=pictures, data={"exits": data})]


def _dataset_section(root: str, others: Sequence[str]) -> Section:
    table = dataset_table(root, others)
    reasons = table.loc[table["reason"] != "", ["data set", "reason"]].itertuples(index=False)
    text = [f"{name} is not loaded: {reason}" for name, reason in reasons]
    return Section(
        "table03", "Table 3. Data sets", text, tables={"": table.drop(columns="reason")}, data={"table03": table}
    )


def _figure_section(results: pd.DataFrame, cells: pd.DataFrame) -> Section:
    higher = dict(zip(results["dataset"], results["higher"], strict=True))
    caption = "Figure 2. Mean scores at alpha 0.1, the values of Tables 8 and 9"
    pictures, tables = [Picture("figure2", caption, figures.score_bars(cells))], {}
    data = {"figure2": cells.query("table in (8, 9) and alpha == 0.1")}
    for number, (parameter, meaning) in SWEEPS.items():
        values = sweep_values(results, parameter, SWEEP_ALPHA)
        drawn = figures.sweep_curves(parameter, values, higher, SWEEP_ALPHA)
        title = f"Figure {number}. Average Delta over {parameter}, {meaning}"
        seeds = ". Grey: single seeds; blue: mean and one standard deviation"
        pictures.append(Picture(f"figure{number}", title + (seeds if drawn else ""), drawn))
        if values:
            rows = [
                {"data set": display_name(name)}
                | {f"{parameter} {value:g}": spread(frame[value].tolist(), signed=True) for value in frame}
                | {"seeds": len(frame)}
                for name, frame in values.items()
            ]
            tables[title] = pd.DataFrame(rows).fillna("")
            data[f"figure{number}"] = pd.concat([frame.assign(dataset=name) for name, frame in values.items()])
    ranked = standings(results)
    pictures += [_ranking_picture(standing) for standing in ranked]
    if ranked:
        data["rankings"] = pd.DataFrame([row for standing in ranked for row in _ranking_rows(standing)])
    return Section("figures", "Figures", tables=tables, pictures=pictures, data=data)


def _ranking_picture(standing: Standing) -> Picture:
    title = f"{display_name(standing.dataset)}: methods ranked by {COMPARED[standing.measure]}"
    ranks = ", ".join(f"{name} {value:.2f}" for name, value in standing.ranking.mean_ranks.items())
    alphas = ", ".join(f"{alpha:g}" for alpha in standing.alphas)
    caption = f"{title}. Alpha {alphas}, {standing.ranking.repetitions} runs per method; mean ranks: {ranks}."
    if standing.omitted:
        caption += f" Omitted, with too few runs: {', '.join(standing.omitted)}."
    name = f"ranking-{_slug(standing.dataset)}-{standing.measure.removeprefix('delta_')}"
    return Picture(name, caption, figures.critical_difference(standing.ranking, title))


def _ranking_rows(standing: Standing) -> list[dict[str, object]]:
    ranking = standing.ranking
    shared = {"repetitions": ranking.repetitions, "friedman_p": ranking.p}
    shared |= {"critical_difference": ranking.critical_difference}
    return [
        {"dataset": standing.dataset, "measure": standing.measure, "method": name, "mean_rank": mean_rank} | shared
        for name, mean_rank in ranking.mean_ranks.items()
    ]


def _comparison_section(results: pd.DataFrame) -> Section:
    compared = method_comparisons(results)
    text = f"Wilcoxon's signed-rank test with at least {MIN_PAIRS} pairs, adjusted by Holm."
    tables = {"": comparison_table(compared)} if len(compared) else {}
    return Section(
        "paired",
        "FedeKD and the other methods, seed by seed",
        [text],
        tables=tables,
        data={"paired": compared.drop(columns="gain")},
    )


def _missing_section(missing: pd.DataFrame) -> Section:
    text = (
        f"Runs without which cells have no test, up to the paper's {SEEDS} seeds. A run gives the cells of all tables."
        " Its time is the median over the runs of the same data set and method, or of the same data set; it includes"
        " the local baseline where a run trained it."
    )
    return Section("missing", "Missing runs", [text], tables={"": missing_table(missing)}, data={"missing": missing})


def _provenance_section(results: pd.DataFrame) -> Section:
    kinds = ["dataset", "commit", "fedekd", "torch", "device", "precision", "threads"]
    table = results.groupby(kinds).size().reset_index(name="runs")
    text = [sentence for sentence in [mixture(results)] if sentence]
    return Section(
        "provenance", "Provenance", text, tables={"": table.assign(dataset=table["dataset"].map(display_name))}
    )


def _slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower())
