"""`report`: hold results against the paper, or show what the early exits of a run are worth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser
from rich.console import Console

from fedekd.atomic import atomic_file
from fedekd.benchmark.collect import measured_in
from fedekd.benchmark.fill import fill
from fedekd.benchmark.measured import Measured
from fedekd.benchmark.report import make_report
from fedekd.benchmark.report_files import write_report
from fedekd.cli.exit_report import has_exits, report_exits
from fedekd.configuration.options import parse
from fedekd.errors import UserError


def report_parser() -> ArgumentParser:
    """The parser of `report`."""
    parser = ArgumentParser(
        prog="orchestrator.py report",
        usage="%(prog)s RUNS [RUNS ...] [OPTIONS]",
        description="Hold results against the paper: Tables 1-10 and Figures 2-4 as HTML, Markdown, CSV and PNG;"
        " or, of a run whose network has exits, what leaving early saves and what is promised of it.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument(
        "runs", type=str, nargs="*", help="Folders of results: of `benchmark`, of its CSV files, or of runs of `fit`."
    )
    parser.add_argument("--output", type=str | None, default=None, help="The report's folder (default: RUNS/report).")
    parser.add_argument(
        "--fill", type=str | None, default=None, help="A Markdown file whose marked places get the tables instead."
    )
    parser.add_argument(
        "--exits",
        type=bool | None,
        default=None,
        help="Whether to tell of a run's early exits, beside further runs on the same data (default: if it has any).",
    )
    parser.add_argument("--client", type=int, default=0, help="Of early exits: whose network (default: 0).")
    parser.add_argument(
        "--draws", type=int, default=200, help="Of early exits: calibrations of each rule (default: 200)."
    )
    parser.add_argument("--root", type=str, default="data", help="Folder of the data files, for Table 3.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `report`; the exit code is 0."""
    config = parse(report_parser(), argv)
    if not config.runs:
        raise UserError("report needs a folder of results, as in: report runs/quick")
    folders = [Path(name) for name in config.runs]
    if not config.fill and (config.exits if config.exits is not None else has_exits(folders[0])):
        return report_exits(folders, Path(config.output) if config.output else folders[0] / "report", config)
    measured = measured_in(folders)
    console = Console()
    for name in measured.apart:
        told = f"{name}: runs with other options than the paper's grid stand apart"
        console.print(told, highlight=False, soft_wrap=True)
    if config.fill:
        _fill(Path(config.fill), measured, folders)
        return 0
    report = make_report(measured, config.root, config.runs)
    output = Path(config.output) if config.output else folders[0] / "report"
    write_report(report, output)
    for line in (
        report.verdict_sentence,
        f"written to {output / 'index.html'}, and as Markdown, CSV and PNG beside it",
    ):
        console.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def _fill(path: Path, measured: Measured, folders: Sequence[Path]) -> None:
    """Rewrite a Markdown file with its marked places filled."""
    if not path.is_file():
        raise UserError(f"--fill {path}: there is no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"--fill {path} is not text in UTF-8: {error.reason} at byte {error.start}") from error
    filled = fill(text, measured, folders)
    if filled != text:
        with atomic_file(path) as file:
            file.write(filled.encode())
    print(f"{path}: {'filled anew' if filled != text else 'nothing to change'}")
