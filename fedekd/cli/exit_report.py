"""`report RUN` of a run whose network has exits: what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console

import fedekd
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import federation_parser, parse
from fedekd.early_exit.report.exit_report import ReportOptions, make_exit_report
from fedekd.early_exit.report.page import finding, write_exit_report
from fedekd.errors import UserError
from fedekd.methods import Client
from fedekd.reporting.pages import current_commit


def has_exits(folder: Path) -> bool:
    """Whether a folder is a run whose networks have exits, as its configuration says."""
    path = folder / "config.yaml"
    if not path.is_file():
        return False
    config = parse(federation_parser(), ["--config", str(path)])
    # The class alone: to make the parts of a run would make its loggers, too.
    module, _, name = config.method.class_path.rpartition(".")
    return config.client.exits is not None or getattr(import_module(module), name).exits is not None


def report_exits(folders: Sequence[Path], output: Path, config: Namespace) -> int:
    """Write the report of the first run, beside Local if it is kept and beside the other runs; the exit code is 0.

    Raises:
        UserError: If a run is not finished, has no exits, or is about other images.
    """
    if config.draws < 1:
        raise UserError(f"--draws is {config.draws}, and must be at least 1")
    console = Console(stderr=True)
    clients: dict[str, Client] = {}
    for folder in folders:
        for name, client in _clients(folder, config.client, beside_local=folder == folders[0]).items():
            clients[f"{name} ({folder})" if name in clients else name] = client
    first, *others = clients.values()
    for other in others:
        if other.splits.digest(other.images) != first.splits.digest(first.images):
            raise UserError(f"report --exits: client {config.client} of these runs has not the same images")
    with console.status("") as status:
        report = make_exit_report(
            clients,
            ReportOptions(draws=config.draws),
            {
                "runs": ", ".join(map(str, folders)),
                "commit": current_commit(),
                "fedekd": fedekd.__version__,
                "torch": torch.__version__,
                "device": torch.cuda.get_device_name() if first.images.pixels.is_cuda else "cpu",
                "threads": torch.get_num_threads(),
                "precision": "float32",
            },
            lambda step: status.update(f"{step} ..."),
        )
    write_exit_report(report, output)
    told = Console()
    for line in (finding(report), f"written to {output / 'index.html'}, and as Markdown, CSV and PNG beside it"):
        told.print(line, highlight=False, soft_wrap=True, markup=False)
    return 0


def _clients(folder: Path, number: int, beside_local: bool) -> dict[str, Client]:
    """One client of a run by the run's method, and as Local left it."""
    orchestrator, _, summary = open_finished("report", folder, in_process=True)
    if not 0 <= number < orchestrator.num_clients:
        raise UserError(f"--client is {number}, and {folder} has the clients 0..{orchestrator.num_clients - 1}")
    client = orchestrator.load_clients()[number]
    client.use_local_model(
        None
    )  # what the method has come to, whichever of the two models do_no_harm lets the client use
    found = {str(summary["method"]): client}
    local = orchestrator.baseline_clients()[number] if beside_local else None
    return found if local is None else found | {"Local": local}
