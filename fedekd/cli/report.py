"""`report`: hold results against the paper, as a page, Markdown, CSV files and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from fedekd.benchmark.collect import collect, paper_grid
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.published import DATASETS
from fedekd.benchmark.report import make_report
from fedekd.benchmark.report_files import write_report
from fedekd.configuration.arguments import parse
from fedekd.errors import UserError


def report_parser() -> ArgumentParser:
    """The parser of `report`."""
    parser = ArgumentParser(
        prog="orchestrator.py report",
        usage="%(prog)s RUNS [RUNS ...] [OPTIONS]",
        description="Hold results against the paper: Tables 1-10 and Figures 2-4 as HTML, Markdown, CSV and PNG.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "runs", type=str, nargs="*", help="Folders of results: of `benchmark`, of its CSV files, or of runs of `fit`."
    )
    parser.add_argument("--output", type=str | None, default=None, help="The report's folder (default: RUNS/report).")
    parser.add_argument("--root", type=str, default="data", help="Folder of the data files, for Table 3.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `report`; the exit code is 0."""
    config = parse(report_parser(), argv)
    if not config.runs:
        raise UserError("report needs a folder of results, as in: report runs/quick")
    folders = [Path(name) for name in config.runs]
    rows = collect(folders)
    keys = {key for dataset in DATASETS.keys() & {row["dataset"] for row in rows} for key in paper_grid(dataset)}
    report = make_report(Measured(rows, keys), config.root, config.runs)
    output = Path(config.output) if config.output else folders[0] / "report"
    write_report(report, output)
    console = Console()
    told = ", ".join(f"{verdict} {count}" for verdict, count in sorted(report.verdicts.items(), key=lambda kv: -kv[1]))
    for line in (
        f"of the paper's {sum(report.verdicts.values())} cells: {told}",
        f"written to {output / 'index.html'}, and as Markdown, CSV and PNG beside it",
    ):
        console.print(line, highlight=False, soft_wrap=True)
    return 0
