"""`calibrate`: select exit thresholds with a guaranteed error rate."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser, Namespace

from fedekd.atomic import atomic_file, digest, seal_json, unseal_json
from fedekd.cli.arguments import add_trained_arguments, require_trained_bits, select_clients
from fedekd.cli.calibrate_output import client_table, exit_table, remarks
from fedekd.cli.folder_lock import lock_folder
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.options import parse
from fedekd.configuration.trained import Trained, open_trained, require_one_source
from fedekd.data import Samples, load_samples, scale, take_inputs
from fedekd.data.formats import format_of
from fedekd.data.formats.torch_dataset import GROUP_ATTRIBUTE
from fedekd.data.group_values import group_values, is_one_to_one
from fedekd.data.raw import ReadOptions
from fedekd.do_no_harm.rule import DoNoHarm
from fedekd.early_exit.calibration.calibrator import MODES, SelectiveRiskCalibrator
from fedekd.early_exit.client_calibration import (
    GroupColumn,
    calibrate_client,
    exit_network,
    input_digests,
    training_indices,
)
from fedekd.early_exit.client_report import ClientExitReport, client_exit_report
from fedekd.early_exit.grouping import CLASSES, TRUE_CLASS
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_files import (
    OtherSamples,
    client_table_path,
    load_policy,
    other_samples_path,
    policy_path,
    report_path,
    save_other_samples,
)
from fedekd.errors import UserError, print_warning, require_choice, shorten, shorten_path
from fedekd.functional import SCORES
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork
from fedekd.monitoring import MonitoredColumns
from fedekd.reporting.console import PlainConsole
from fedekd.reporting.pages import csv_text, write_text
from fedekd.seeding import derive_seed


def calibrate_parser() -> ArgumentParser:
    """Create the parser of `calibrate`."""
    guaranteed = " and ".join(name for name, mode in MODES.items() if mode.has_guarantee)
    parser = ArgumentParser(
        prog="orchestrator.py calibrate",
        usage="%(prog)s RUN | --site FOLDER [--target_risk 0.05] [--confidence 0.9] [OPTIONS]",
        description="Calibrate the early exits of a finished run: with the given confidence, the error rate among the"
        " images that take an exit is at most the target risk at every exit. Writes exits/client-000.json etc. into the"
        " folder of the run or of the site.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_trained_arguments(parser)
    parser.add_argument(
        "--target_risk",
        type=float,
        default=0.05,
        help="Maximum error rate among the images that take an exit, in (0, 1).",
    )
    parser.add_argument(
        "--confidence",
        type=float,
        default=0.9,
        help="Probability that the guarantees of all exits of a client hold, in (0, 1).",
    )
    parser.add_argument(
        "--mode",
        type=str,
        default="ltt",
        help=f"Calibration rule: {', '.join(MODES)}; only {guaranteed} have a guarantee.",
    )
    parser.add_argument(
        "--score",
        type=str,
        default="max_softmax",
        help=f"Confidence score: {', '.join(SCORES)}.",
    )
    parser.add_argument(
        "--gamma",
        type=float,
        default=1.0,
        help="Score agreement only: weight of the disagreement of exit and proxy, at least 0.",
    )
    parser.add_argument(
        "--client",
        type=str | None,
        default=None,
        help="Number of a single client, or name of its site (default: all clients).",
    )
    parser.add_argument(
        "--familywise",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="The confidence holds for all clients at once (default: for each client separately).",
    )
    parser.add_argument(
        "--groups",
        type=str | None,
        default=None,
        help="Bound the error rate of each group, all at once: a column of the data, predicted_class, or true_class"
        " (with shared thresholds, because it is unknown at deployment). Default: one bound for all samples.",
    )
    parser.add_argument(
        "--shared_thresholds",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="With --groups: one threshold per exit for all groups (default: one per group, which must be known at"
        " deployment).",
    )
    parser.add_argument(
        "--input",
        type=str | None,
        default=None,
        help="Other labelled images: an .npz file, a folder with a subfolder per class, or a manifest (default: the"
        " clients' held-out splits).",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `calibrate RUN` or `calibrate --site FOLDER`; writes policies to `exits`."""
    config = parse(calibrate_parser(), argv)
    require_one_source("calibrate", config.run, config.site)
    _calibrator(config.target_risk, config.confidence, config.mode)  # validates options before the run is loaded
    require_choice("--score", config.score, SCORES)
    if not 0 <= config.gamma < math.inf:
        raise UserError(f"--gamma: expected a finite number of at least 0, got {config.gamma}")
    if config.familywise and config.client is not None:
        raise UserError(f"--familywise: expected all clients, got --client {config.client}. Remove one of both")
    if config.shared_thresholds and config.groups is None:
        raise UserError("--shared_thresholds: expected --groups, got none. Name a column, or omit it")
    if config.groups is not None and config.mode != "ltt":
        raise UserError(f"--mode: expected ltt with --groups, got {config.mode}. Omit one of both")
    trained = open_trained("calibrate", config.run, config.site)
    folder, clients = trained.folder, trained.clients
    options = trained.data.read_options
    held_out = None if config.input is None else _load(config.input, clients[0].samples, options)
    groups = None if config.groups is None else _groups(config, trained, held_out)
    trained_on = torch.cat([training_indices(client) for client in clients])
    rule = trained.do_no_harm
    compared_on = [] if rule is None else [_compared(client, rule) for client in clients]
    seen = torch.cat([trained_on, *compared_on])
    selected = select_clients(clients, config.client)
    if config.client is None:
        # Architectures without exits are skipped; if no client has exits, the first raises the error.
        selected = [each for each in selected if isinstance(each.deployed_model, MultiExitNetwork)] or selected[:1]
    # A site has one of the clients, and counts all of them.
    together = len(selected) if config.site is None else trained.spec.num_clients
    simultaneous = together if config.familywise else 1
    calibrator = _calibrator(config.target_risk, config.confidence, config.mode, simultaneous)
    # All policies before the first is written: after an error the run folder is unchanged.
    unit = options.group_column or "group"
    try:
        policies = [
            calibrate_client(client, calibrator, config.score, held_out, seen, config.gamma, groups, unit)
            for client in selected
        ]
    except UserError as error:
        raise UserError(re.sub("^groups:", "--groups:", str(error))) from error
    others = {} if held_out is None else {client.number: _others(client, held_out) for client in selected}
    table = client_table_path(folder)
    has_table = table.is_file() if config.client is not None else len(clients) > 1
    pairs = list(zip(selected, policies, strict=True))
    console = PlainConsole()
    reports = [_report(trained, client, policy) for client, policy in pairs] if has_table else []
    # `monitor --apply` and other calls write here, too. The table needs the policies of other clients as they stay.
    with lock_folder(table.parent):
        if has_table and config.client is not None:
            reports += _other_reports(trained, [client for client in clients if client not in selected])
        for client, policy in pairs:
            path = policy_path(folder, client.number)
            if not config.familywise and (config.client is not None or config.site is not None):
                _warn_of_broken_family(folder, client.number, console)
            if held_out is not None:
                save_other_samples(folder, client.number, others[client.number])
            policy.save(path)
            if held_out is None:  # after the policy that these samples calibrated was replaced
                other_samples_path(folder, client.number).unlink(missing_ok=True)
        if has_table:
            rows = [_row(report, clients) for report in sorted(reports, key=lambda report: report.client)]
            columns = [field.name for field in fields(ClientExitReport)]
            write_text(table, csv_text(list(rows[0]) if rows else columns, rows))
            with atomic_file(report_path(folder)) as file:
                file.write(seal_json({_report_key(folder, row["client"]): row for row in rows}))
    for client, policy in pairs:
        console.print(exit_table(policy, client))
        lines = remarks(policy, client, trained_on if held_out is None else None)
        for line in (*lines, f"written to {policy_path(folder, client.number)}"):
            console.print(line, soft_wrap=True)
    if has_table:
        if config.client is None:
            titles, unit = [client.splits.title for client in clients], policies[0].unit
            has_names = clients[0].splits.name is not None
            console.print(client_table(reports, calibrator, titles, unit, has_names))
        skipped = len(clients) - len(selected) if config.client is None else 0
        note = f"; {skipped} clients have no exits" if skipped else ""
        console.print(f"written to {table}{note}", soft_wrap=True)
    return 0


def _others(client: Client, held_out: Samples) -> OtherSamples:
    """Return what a monitor needs of other samples."""
    drawn = held_out.one_per_group(torch.arange(len(held_out)), derive_seed(client.spec.seed, client.number, "drift"))
    drift = MonitoredColumns(client).drift_values(take_inputs(held_out.inputs, drawn.to(held_out.inputs.device)))
    return OtherSamples(list(input_digests(held_out.inputs)), drift)


def _compared(client: Client, rule: DoNoHarm) -> torch.Tensor:
    """Return the indices of the samples on which a client compared its models."""
    names = rule.compared_splits(client.spec.task, client.training_splits)
    return torch.cat([getattr(client.splits, name) for name in names])


def _calibrator(target_risk: float, confidence: float, mode: str, clients: int = 1) -> SelectiveRiskCalibrator:
    try:
        return SelectiveRiskCalibrator(target_risk, confidence, mode, clients)
    except UserError as error:
        raise UserError(f"--{error}") from error


def _warn_of_broken_family(folder: Path, number: int, console: PlainConsole) -> None:
    """Print a warning if a familywise policy is replaced."""
    previous = None
    with suppress(UserError):  # an invalid policy is replaced as well
        previous = load_policy(folder, number)
    if previous is not None and previous.simultaneous_clients > 1:
        console.print(
            f"warning: the replaced policy was one of {previous.simultaneous_clients} calibrated with --familywise."
            " Their guarantees no longer hold at once",
            soft_wrap=True,
        )


def _groups(config: Namespace, trained: Trained, held_out: Samples | None) -> GroupColumn:
    """Return the groups that `--groups` names, with the values of a column.

    Raises:
        UserError: The data, or those of `--input`, have no such column.
    """
    name = config.groups
    if name in CLASSES:
        return GroupColumn(name, config.shared_thresholds or name == TRUE_CLASS)
    try:
        if held_out is None:
            values = trained.data.group_values(name)
        else:
            like = trained.clients[0].samples
            values = group_values(name, held_out, **_source(config.input, like, trained.data.read_options))
    except UserError as error:
        hint = f"{str(error).rstrip('.')}. Other groups: {' and '.join(CLASSES)}"
        raise UserError(re.sub(r"^(groups|data\.\w+): ", "--groups: ", hint)) from error
    labels = (trained.clients[0].samples if held_out is None else held_out).labels
    if is_one_to_one(values, labels.cpu().numpy()):
        raise UserError(
            f"--groups: expected a column other than the target, got {shorten(name)!r}, whose values are the classes."
            f" Use --groups {TRUE_CLASS}"
        )
    return GroupColumn(name, config.shared_thresholds, values)


def _report(trained: Trained, client: Client, policy: ExitPolicy) -> ClientExitReport:
    """Evaluate a policy on the test split, with the groups that its thresholds need."""
    groups = None
    if policy.needs_group:
        with suppress(UserError):  # a column of --input only: all samples take the last exit
            groups = trained.data.group_values(policy.group_by)
    return client_exit_report(client, policy, groups)


def _other_reports(trained: Trained, clients: Sequence[Client]) -> list[ClientExitReport]:
    """Return the stored rows; evaluate policies that have none or were changed.

    A damaged policy has no row in the table.
    """
    folder = trained.folder
    stored: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # missing or changed: evaluate again
        stored = unseal_json(report_path(folder).read_bytes())
    reports = []
    for client in clients:
        try:
            policy = load_policy(folder, client.number)
            if policy is None:
                continue
            policy.require(exit_network(client), client.networks.get("proxy"))
            row = stored.get(_report_key(folder, client.number))
            if row is not None:
                row.pop("site", None)
            reports.append(_report(trained, client, policy) if row is None else ClientExitReport(**row))
        except UserError as error:
            print_warning(f"{client.splits.label} has no row in the table: {error}")
    return reports


def _row(report: ClientExitReport, clients: Sequence[Client]) -> dict[str, Any]:
    """Return the row of a client in the table, with the name of its site."""
    name = clients[report.client].splits.name
    values = asdict(report)
    return values if name is None else {"client": values.pop("client"), "site": name, **values}


def _report_key(folder: Path, number: int) -> str:
    return f"{number} {digest(policy_path(folder, number).read_bytes())}"


def input_error(error: UserError, options: Sequence[str] = ()) -> UserError:
    """Return the error of a file given by `--input`, without options of `fit`.

    Args:
        error: Its text may begin with `data.NAME:` and end with a hint on another option.
        options: Options of `data` that the command has, too.
    """
    message = re.sub(r"^data\.\w+: ", "", str(error))
    for name in options:
        message = message.replace(f"--data.{name}", f"--{name}")
    # The run decides on labels, sizes and ranges, which these commands cannot change.
    for hint in (" Leave out", " Set --data.", ", or set --data."):
        message = message.partition(hint)[0]
    return UserError(f"--input: {message.rstrip('.')}")


def _group_error(message: UserError, error: UserError) -> UserError:
    """Return the error of `--input`; for a group column with the reason for it."""
    if not str(error).startswith("data.group_column"):
        return message
    text = str(message).partition(". Choose from")[0].rstrip(".")
    return UserError(f"{text}. Add it: images of one group, such as a patient, are not independent")


def _source(path: str, like: Samples, options: ReadOptions) -> dict[str, Any]:
    """Return the arguments with which `--input` is read as the run reads its own."""
    names = ("target_column", "image_size", "value_range", "skip_unreadable")
    default = None if like.group is None else GROUP_ATTRIBUTE  # groups of a data set without an option
    return {
        "name": path,
        "task": like.task,
        "num_classes": like.num_classes,
        "ignore_label": like.ignore_label,
        "classes": like.class_names,
        "memory_limit": math.inf,
        "group_column": options.group_column or default,
        **{name: getattr(options, name) for name in names},
    }


def _load(path: str, like: Samples, options: ReadOptions) -> Samples:
    """Read labelled images as the run reads its own."""
    try:
        row = format_of(Path(path).expanduser())
        if row is None or row.read_unlabelled is None:
            raise UserError(f"expected labelled images: an .npz file, a folder or a manifest, got {shorten_path(path)}")
        samples = load_samples(**_source(path, like, options))
        require_trained_bits(like, samples.inputs.dtype == torch.uint8)
        if like.inputs.dtype != torch.uint8:  # sites of 8 and of 16 bits were joined: digests must agree
            samples = replace(samples, inputs=scale(cast(torch.Tensor, samples.inputs)))
    except UserError as error:
        raise _group_error(input_error(error), error) from error
    if samples.input_shape == (1, *like.input_shape[1:]):
        pixels = cast(torch.Tensor, samples.inputs)  # memory_limit is infinite
        samples = replace(samples, inputs=pixels.expand(-1, *like.input_shape).contiguous())
    return samples
