"""Command `report`: write one page about finished runs or a grid."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jsonargparse import ArgumentParser

from fedekd.benchmark.grid import decisive_options
from fedekd.benchmark.grid_report import grid_sections
from fedekd.benchmark.results import read_results
from fedekd.cli.exit_report import exit_report, has_exits
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.load_run import parse_run
from fedekd.configuration.options import as_values, federation_parser, parse
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.do_no_harm.statement import do_no_harm_guarantee
from fedekd.early_exit.report.page import exit_sections, finding
from fedekd.errors import UserError, listed
from fedekd.federation import RunFolder
from fedekd.reporting import read_metrics_csv
from fedekd.reporting.document import Section, write_document
from fedekd.reporting.run_report import Run, run_sections

#: A report has figures and clients of at most this number of runs.
MAX_RUNS = 20


def report_parser() -> ArgumentParser:
    """Build the parser of `report`."""
    parser = ArgumentParser(
        prog="orchestrator.py report",
        usage="%(prog)s RUNS [RUNS ...] [OPTIONS]",
        description="Write one page (HTML and Markdown, with CSV and PNG files) about finished runs: settings,"
        " clients, scores, Delta, rounds, and the commands that repeat them. For a run whose network has exits, it"
        " also calibrates the exits of the federated model again, at fixed target risks. For the results of"
        " `benchmark`, the page has the methods over seeds.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("runs", type=str, nargs="*", help="Folders of runs of `fit`, or of `benchmark`.")
    parser.add_argument("--output", type=str | None, default=None, help="Folder of the report (default: RUNS/report).")
    parser.add_argument(
        "--exits",
        type=bool | None,
        default=None,
        help="Calibrate the exits of the first run and compare them with those of the other runs, which must have the"
        " same data (default: if the first run has exits).",
    )
    parser.add_argument(
        "--client", type=str, default="0", help="Number of the client, or name of the site, whose exits are calibrated."
    )
    parser.add_argument(
        "--wandb",
        type=bool,
        default=False,
        help="Log the page to the W&B run of the first folder, which must be on the server.",
    )
    parser.add_argument("--draws", type=int, default=200, help="Number of calibrations per mode.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `report`; the exit code is 0."""
    config = parse(report_parser(), argv)
    if not config.runs:
        raise UserError("report: expected the folder of a run, as in: report runs/digits-fedekd-001")
    folders = [Path(name) for name in config.runs]
    results, run_folders = _find(folders)
    if len(run_folders) > MAX_RUNS:
        raise UserError(f"report: expected at most {MAX_RUNS} runs, got {len(run_folders)}. Name some of them.")
    if config.wandb:
        from fedekd.reporting.wandb_report import log_report, require_online_run  # not at the top: slow to import

        require_online_run(folders[0])  # first: a page takes minutes
    output = Path(config.output) if config.output else folders[0] / "report"
    sections: list[Section] = [] if results.empty else grid_sections(results)
    runs = [_read_run(folder) for folder in run_folders]
    if runs:
        sections += run_sections(runs)
    text = []
    if config.exits or (config.exits is None and has_exits(folders[0])):
        report = exit_report(folders, config)
        sections += exit_sections(report)
        text.append(finding(report))
    write_document(f"Report: {', '.join(config.runs)}", [*text, *_do_no_harm(runs)], sections, output)
    for line in (*text, f"Report: {output / 'index.html'}"):
        print(line)
    if config.wandb:
        print(f"logged at {log_report(folders[0], output)}")
    return 0


def _do_no_harm(runs: Sequence[Run]) -> list[str]:
    """Return the guarantees of do no harm in words, with the runs that have them."""
    names: dict[str, list[str]] = {}
    for run in runs:
        if "deployed" in run.summary:
            rule = DoNoHarm.from_stored(run.summary["deployed"]["rule"])
            # A server of sites has no groups; a data set may have them without the option.
            is_grouped = "grouped" in run.summary["deployed"] or "data.group_column" in run.settings
            statement = do_no_harm_guarantee(rule, run.summary["task"], is_grouped=is_grouped)
            names.setdefault(statement, []).append(run.name)
    return [f"{listed(of)}: {statement}" if len(runs) > 1 else statement for statement, of in names.items()]


def _find(folders: Sequence[Path]) -> tuple[pd.DataFrame, list[Path]]:
    """Return the results of grids, and the folders of other finished runs.

    Raises:
        UserError: If a folder does not exist, or has neither results nor a finished run.
    """
    frames, runs = [], []
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"report: expected the folder of a run, got {folder}, which does not exist.")
        # The CSV files in the folder of a run are not results of `benchmark`.
        places = [folder / "results"] if (folder / "config.yaml").is_file() else [folder, folder / "results"]
        results = pd.concat([read_results(place) for place in places])
        # The runs of a grid are in folders named by their keys, and their rows are in its results.
        below = [path.parent for path in sorted(folder.rglob("summary.json")) if path.parent.name not in results.index]
        below = [path for path in below if (path / "config.yaml").is_file()]
        if results.empty and not below:
            raise UserError(
                f"report: expected a finished run or results of `benchmark`, got {folder}, which has neither."
                f" Continue an unfinished run with: fit --resume {shlex.quote(str(folder))}"
            )
        frames.append(results)
        runs += below
    merged = pd.concat(frames).fillna("")
    return merged[~merged.index.duplicated()], list(dict.fromkeys(runs))


def _read_run(folder: Path) -> Run:
    """Read the files of a finished run.

    Raises:
        UserError: If one of them is damaged.
    """
    parser = federation_parser()
    try:
        RunFolder(folder, {}).require_intact("config.yaml", "metrics.csv", "summary.json")
        values = as_values(parser, parse_run(parser, folder))
        text = (folder / "summary.json").read_text(encoding="utf-8")
        summary = json.loads(text)
        history = read_metrics_csv(folder / "metrics.csv")
        settings = {name.replace(".init_args", ""): value for name, value in decisive_options(values, parser).items()}
        partition = str(values["data"].get("partition") or "Dirichlet")
        if "alpha" not in summary:
            partition = ""  # sites
        elif partition != "iid":
            partition += f", alpha {summary['alpha']:g}"
        name = shlex.quote(str(folder))
        return Run(
            name=str(folder),
            command=f"fedekd fit --config {name}/config.yaml --output {name}-repeat",
            settings=settings,
            partition=partition,
            summary=summary,
            history=history,
        )
    except (UserError, ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"report: the run in {folder} is damaged: {error}") from error
