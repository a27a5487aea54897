"""`calibrate`: at which confidence may images leave a trained network early, such that few of them are wrong?"""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.data import ImageData, load_images
from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import (
    calibrate_client,
    costs_of,
    exit_lines,
    exits_of,
    learned_from,
    share_saved,
    shared_images,
)
from fedekd.early_exit.client_report import ClientExitReport, client_exit_report
from fedekd.early_exit.policies import client_lines_path, load_policy, policy_path
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, nearest
from fedekd.functional import SCORES
from fedekd.methods import Client
from fedekd.models import ExitCosts, MultiExitNetwork
from fedekd.reporting.pages import csv_text, write_text


def calibrate_parser() -> ArgumentParser:
    """The parser of `calibrate`."""
    parser = ArgumentParser(
        prog="orchestrator.py calibrate",
        usage="%(prog)s RUN [--alpha 0.05] [--delta 0.1] [OPTIONS]",
        description="Calibrate the exits of a finished run: of the images that leave early at an exit, at most alpha"
        " are wrong, and with probability 1 - delta that holds at all exits.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, nargs="?", default="", help="The folder of a finished run.")
    parser.add_argument("--alpha", type=float, default=0.05, help="Error rate among those who leave, in (0, 1).")
    parser.add_argument("--delta", type=float, default=0.1, help="Probability that a promise fails, in (0, 1).")
    parser.add_argument(
        "--mode",
        type=str,
        default="ltt",
        help=f"{', '.join(MODES)}; only ltt and path promise anything (default: ltt).",
    )
    parser.add_argument("--score", type=str, default="max_softmax", help=f"{', '.join(SCORES)}.")
    parser.add_argument(
        "--gamma",
        type=float,
        default=1.0,
        help="Of the score agreement: what the exit's disagreement with the proxy takes from its confidence.",
    )
    parser.add_argument(
        "--client", type=int | None, default=None, help="One client only (default: each its own policy)."
    )
    parser.add_argument(
        "--simultaneous",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="The promises of all clients hold at once: each is made at delta / clients (default: each for itself).",
    )
    parser.add_argument(
        "--input",
        type=str | None,
        default=None,
        help="Other labelled images, .npz in MedMNIST's layout (default: the clients' own held-out ones).",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `calibrate RUN`; writes RUN/exits/client-000.json and so on."""
    config = parse(calibrate_parser(), argv)
    if not config.run:
        raise UserError("calibrate needs the folder of a run, as in: calibrate runs/NAME --alpha 0.05")
    _calibrator(config.alpha, config.delta, config.mode)  # is particular about its arguments
    if config.score not in SCORES:
        raise UserError(f"--score is {config.score!r}, which is not known; {nearest(config.score, SCORES)}")
    if not 0 <= config.gamma < math.inf:
        raise UserError(f"--gamma is {config.gamma}, and must be a finite number of at least 0")
    folder = Path(config.run)
    orchestrator, _, _ = open_finished("calibrate", folder, in_process=True)
    clients = orchestrator.load_clients()
    held_out = None if config.input is None else _load(config.input, clients[0].images)
    trained_on = torch.cat([learned_from(client) for client in clients])
    rule = orchestrator.do_no_harm
    chosen_by = [] if rule is None else [getattr(client.splits, rule.split) for client in clients]
    off_limits = torch.cat([trained_on, *chosen_by])
    console = Console()
    chosen = chosen_clients(clients, config.client)
    if config.client is None:
        # Of several architectures some may have exits and some not; where none has, the first tells what is missing.
        chosen = [each for each in chosen if isinstance(each.deployed_model, MultiExitNetwork)] or chosen[:1]
    if config.simultaneous and config.client is not None:
        raise UserError(f"--simultaneous is for all clients together, and --client is {config.client}")
    delta = config.delta / len(chosen) if config.simultaneous else config.delta
    calibrator = _calibrator(config.alpha, delta, config.mode)
    # All of them before the first is written: a mistake leaves everything as it was.
    policies = [
        replace(
            calibrate_client(client, calibrator, config.score, held_out, off_limits, config.gamma),
            together=len(chosen) if config.simultaneous else 1,
        )
        for client in chosen
    ]
    table = client_lines_path(folder)
    in_table = table.is_file() if config.client is not None else len(clients) > 1
    lines = (
        [client_exit_report(client, policy) for client, policy in zip(chosen, policies, strict=True)]
        if in_table
        else []
    )
    for client, policy in zip(chosen, policies, strict=True):
        path = policy_path(folder, client.number)
        if config.client is not None:
            _tell_of_those_left(folder, client.number, console)
        policy.save(path)
        console.print(_table(policy, client))
        for line in (*_remarks(policy, client, trained_on if held_out is None else None), f"written to {path}"):
            console.print(line, highlight=False, soft_wrap=True)
    if in_table:
        _write_lines(table, lines, keep=config.client is not None)
        if config.client is None:
            console.print(_client_table(lines, config.delta if config.simultaneous else None, calibrator))
        without = len(clients) - len(chosen) if config.client is None else 0
        told = f"; {without} clients have no exits" if without else ""
        console.print(f"written to {table}{told}", highlight=False, soft_wrap=True)
    return 0


def _calibrator(alpha: float, delta: float, mode: str) -> SelectiveRiskCalibrator:
    try:
        return SelectiveRiskCalibrator(alpha, delta, mode)
    except UserError as error:
        raise UserError(f"--{error}") from error


def _tell_of_those_left(folder: Path, number: int, console: Console) -> None:
    """That a promise made for several clients at once is none any more where one of them gets another policy."""
    before = None
    with suppress(UserError):  # a damaged policy is replaced like any other
        before = load_policy(folder, number)
    if before is not None and before.together > 1:
        console.print(
            f"the policy that is replaced was one of {before.together} made to hold at once (--simultaneous): with the"
            " new one they no longer do",
            soft_wrap=True,
        )


def _write_lines(path: Path, lines: Sequence[ClientExitReport], keep: bool = False) -> None:
    """The table of all clients; with `keep`, those of the file that are not among the lines stay in it."""
    names = [field.name for field in fields(ClientExitReport)]
    rows = _rows(path, names) if keep else {}
    rows |= {line.client: asdict(line) for line in lines}
    write_text(path, csv_text(names, [rows[number] for number in sorted(rows)]))


def _rows(path: Path, names: Sequence[str]) -> dict[int, Mapping[str, Any]]:
    """The lines of a table by client; none of one that is damaged or of another version, which is then begun anew."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, strict=True))
        whole = all(list(row) == names and None not in row.values() for row in rows)
        return {int(row["client"]): row for row in rows} if whole else {}
    except (csv.Error, ValueError):  # of the latter are bytes that are no UTF-8
        return {}


def _client_table(
    lines: Sequence[ClientExitReport], together: float | None, calibrator: SelectiveRiskCalibrator
) -> Table:
    """What each client may rely on."""
    promise = f"{together:g} for all clients together" if together is not None else f"{calibrator.delta:g} each"
    table = Table(title=f"error rates of those who leave early: alpha {calibrator.alpha:g}, delta {promise}")
    for heading in ("client", "exits open", "leave early", "FLOPs saved", "promised", "seen", "accuracy", "change"):
        table.add_column(heading, justify="right")
    for line in lines:
        table.add_row(
            str(line.client),
            f"{line.open} of {line.exits - 1}",
            f"{line.leaving:.1%}",
            f"{line.saved:.1%}",
            "" if line.certified_risk is None else f"≤ {line.certified_risk:g}",
            "" if line.seen_risk is None else f"{line.seen_risk:.4f}",
            f"{line.accuracy:.4f}",
            f"{line.accuracy - line.full_accuracy:+.4f}",
        )
    return table


def chosen_clients(clients: Sequence[Client], number: int | None) -> Sequence[Client]:
    """All clients, or the one that was asked for.

    Raises:
        UserError: If there is no such client.
    """
    if number is None:
        return clients
    if not 0 <= number < len(clients):
        raise UserError(f"--client is {number}, and this run has the clients 0..{len(clients) - 1}")
    return [clients[number]]


def _load(path: str, like: ImageData) -> ImageData:
    if not path.endswith(".npz"):
        raise UserError(f"--input {path}: an .npz file in MedMNIST's layout is needed")
    try:
        return load_images(path, task=like.task, num_classes=like.num_classes)
    except UserError as error:
        told = str(error).replace("data.dataset:", "--input:", 1)
        raise UserError(told.replace(" (data.num_classes sets it)", ", as in the run")) from error


def _table(policy: ExitPolicy, client: Client) -> Table:
    """The policy exit by exit."""
    lines = exit_lines(policy, _costs(client))
    table = Table(
        title=f"client {client.number}: alpha {policy.alpha:g}, delta {policy.delta:g}, {policy.mode}, {policy.score}"
    )
    for heading in ("exit", "threshold", "samples", "errors", "certified", "leave", "FLOPs saved"):
        table.add_column(heading, justify="right")
    for line in lines:
        last = line.exit == policy.num_exits
        table.add_row(
            str(line.exit),
            "all" if last else "closed" if line.threshold is None else f"{line.threshold:.4f}",
            str(line.samples),
            str(line.errors),
            "" if line.bound is None else f"≤ {line.bound:g}",
            f"{line.share:.1%}",
            f"{line.saved:.1%}",
        )
    return table


def _costs(client: Client) -> ExitCosts:
    return costs_of(exits_of(client), client.images, client.networks.get("proxy"))


def _remarks(policy: ExitPolicy, client: Client, trained_on: torch.Tensor | None) -> list[str]:
    """What the table does not tell."""
    costs = _costs(client)
    remarks = [f"exit {line.exit}: {line.note}" for line in exit_lines(policy, costs) if line.note]
    exits = [place for place, count in enumerate(policy.leaving) for _ in range(count)]
    remarks.append(f"an image saves {share_saved(policy, exits, costs):.1%} of the full network's FLOPs on average")
    if not MODES[policy.mode].promises:
        remarks.append(f"mode {policy.mode} promises nothing of these exits; ltt and path do")
    if trained_on is not None:
        images, splits = client.images.pixels, client.splits
        held_out = images[torch.cat([splits.tuning, splits.calibration])]
        if shared := shared_images(held_out, images[trained_on]):
            remarks.append(
                f"{shared} of {len(held_out)} held-out images are, pixel by pixel, also among those trained on: the"
                " data set repeats itself, and so will what comes, if it is of the same law"
            )
    return remarks
