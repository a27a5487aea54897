"""`report RUN` for a run whose network has exits."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch
from jsonargparse import Namespace
from rich.console import Console

import fedekd
from fedekd.cli.arguments import select_clients
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import federation_parser, parse
from fedekd.early_exit.report.exit_report import ExitReport, ReportOptions, make_exit_report
from fedekd.errors import UserError, shorten_path
from fedekd.federation import RunFolder
from fedekd.methods import Client
from fedekd.reporting.pages import current_commit


def has_exits(folder: Path) -> bool:
    """Check whether the folder is a classification run whose network has exits."""
    path = folder / "config.yaml"
    if not path.is_file() or _is_regression(folder):
        return False
    config = parse(federation_parser(), ["--config", str(path)])
    # Only the class is imported: building all parts would create loggers.
    module, _, name = config.method.class_path.rpartition(".")
    return config.client.exits is not None or getattr(import_module(module), name).exits is not None


def _is_regression(folder: Path) -> bool:
    summary = RunFolder(folder, {}).summary
    return summary is not None and summary["task"] == "regression"


def exit_report(folders: Sequence[Path], config: Namespace) -> ExitReport:
    """Calibrate the exits of a run and compare it with other runs.

    The first run is also compared with its local baseline, if it is stored.

    Args:
        folders: Run folders, at least 1.
        config: Options `client` and `draws`.

    Raises:
        UserError: A run is not finished, has no exits or has other images.
    """
    for folder in folders:
        if _is_regression(folder):
            raise UserError(f"report: expected a classification run for the part on exits, got {shorten_path(folder)}")
    options = ReportOptions(draws=config.draws)
    clients: dict[str, Client] = {}
    for folder in folders:
        for name, client in _clients(folder, config.client, with_baseline=folder == folders[0]).items():
            clients[f"{name} ({folder})" if name in clients else name] = client
    device = next(iter(clients.values())).samples.inputs.device
    provenance = {
        "runs": ", ".join(map(str, folders)),
        "client": next(iter(clients.values())).splits.label,
        "commit": current_commit(),
        "fedekd": fedekd.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "threads": torch.get_num_threads(),
        "precision": "float32",
    }
    with Console(stderr=True).status("") as status:
        return make_exit_report(clients, options, provenance, lambda step: status.update(f"{step} ..."))


def _clients(folder: Path, chosen: str, with_baseline: bool) -> dict[str, Client]:
    """One client with the federated model, and with the local baseline."""
    orchestrator, _, summary = open_finished("report", folder, in_process=True)
    [client] = select_clients(orchestrator.load_clients(), chosen)
    client.use_local_model(None)  # report the federated model, whichever model do_no_harm deployed
    clients = {str(summary["method"]): client}
    baseline = orchestrator.baseline_clients()[client.number] if with_baseline else None
    return clients if baseline is None else clients | {"Local": baseline}
