"""`predict`: predict the targets of new samples with a finished run."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fedekd.cli.arguments import (
    add_client_argument,
    add_trained_arguments,
    policy_of_group,
    require_trained_bits,
    select_client,
    warn_without_guarantee,
)
from fedekd.cli.calibrate import input_error
from fedekd.cli.label_prior import (
    ESTIMATED,
    TRAIN,
    LabelPrior,
    check_label_prior,
    network_label_prior,
    parse_label_prior,
    resolve_label_prior,
)
from fedekd.cli.prediction_file import (
    Outputs,
    add_output_arguments,
    check_output,
    prediction_columns,
    write_predictions,
)
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.options import parse
from fedekd.configuration.trained import Trained, open_trained, require_one_source
from fedekd.data import FederatedDataModule, scale
from fedekd.data.formats.table import is_table_file
from fedekd.data.group_values import input_values
from fedekd.data.unlabelled import read_images
from fedekd.early_exit.deployed import deployed_outputs
from fedekd.early_exit.grouping import CLASSES
from fedekd.early_exit.latency import forward_milliseconds
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE
from fedekd.errors import UserError, listed, print_warning, require, shorten, shorten_path
from fedekd.functional import adjust_log_prior, max_softmax_confidence
from fedekd.methods import Client
from fedekd.methods.serving import LOCAL
from fedekd.models import network_flops
from fedekd.monitoring.columns import MonitoredColumns


class _Inputs(NamedTuple):
    """New samples, as a network takes them, in batches."""

    batches: Iterable[Tensor]
    size: int
    names: list[str] | None
    groups: Sequence[str | None] | None = None


def predict_parser() -> ArgumentParser:
    """Create the parser of `predict`."""
    parser = ArgumentParser(
        prog="orchestrator.py predict",
        usage="%(prog)s RUN | --site FOLDER --input FILE [--output predictions.csv] [--client K]",
        description="Predict classes or values of images or of the rows of a table with the network of one client of a"
        " finished run, or of a site of a Flower run.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_trained_arguments(parser)
    parser.add_argument(
        "--input",
        type=str,
        default="",
        help="An image, a folder of images, a manifest, an .npz file, or a table; labels are not needed.",
    )
    parser.add_argument(
        "--skip_unreadable",
        type=bool,
        default=False,
        help="Leave out images that cannot be read, with a warning. Default: they are errors.",
    )
    add_output_arguments(parser)
    add_client_argument(parser)
    parser.add_argument(
        "--group",
        type=str | None,
        default=None,
        help="Group of all inputs without the column, if the exit policy has thresholds per group of a column. Default:"
        " read the column from the inputs; without it all samples take the last exit.",
    )
    parser.add_argument(
        "--label_prior",
        type=str,
        default=TRAIN,
        help="Label prior of the inputs, to which outputs are corrected from the prior of the network, its mean"
        " probabilities on the validation split: train (no correction), uniform, estimated from the inputs, or a list"
        " of one probability per class.",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `predict RUN` or `predict --site FOLDER`; writes one file atomically."""
    config = parse(predict_parser(), argv)
    require_one_source("predict", config.run, config.site)
    if not config.input:
        raise UserError("--input: expected a file or folder, got none. Example: predict runs/NAME --input images.npz")
    output, source = Path(config.output), Path(config.input).expanduser()
    check_output(config.output)
    label_prior = parse_label_prior(config.label_prior)
    expected = "false with --label_prior, which corrects the ensemble and not its members"
    require(label_prior == TRAIN or not config.members, "--members", expected, True)
    is_used = label_prior == TRAIN or config.group is None
    require(is_used, "--group", "none with --label_prior, which uses no exit policy", config.group)
    expected = "false with --label_prior, because the monitored guarantees are those of uncorrected outputs"
    require(label_prior == TRAIN or not config.monitoring, "--monitoring", expected, True)
    trained = open_trained("predict", config.run, config.site)
    client = select_client(trained, config.client)
    _check_columns(client, config)
    stored = trained.policy(client)
    is_table = is_table_file(source)
    try:
        inputs = _read(trained.data, client, source, is_table, config.skip_unreadable)
    except UserError as error:
        raise input_error(error, ["skip_unreadable"]) from error
    policy = _usable_policy(trained, client, stored, label_prior, config.group)
    policy, inputs = _with_groups(policy, inputs, source, config.group)
    monitored = _monitored_columns(trained, client, stored) if config.monitoring else None
    kind = "row" if is_table else "image"
    batches = _predictions(client, policy, inputs, label_prior, config.members, monitored)
    # One dict per sample took 98 MiB for 200,000 samples, a frame per batch 29 MiB.
    frames = [pd.DataFrame(prediction_columns(client, batch, config.probabilities)) for batch in batches]
    predictions = pd.concat(frames, ignore_index=True)
    write_predictions(output, kind, predictions, inputs.names)
    exits = predictions["exit"].value_counts(normalize=True, sort=False).sort_index()
    shares = ", ".join(f"exit {exit_}: {share:.1%}" for exit_, share in exits.items())
    print(f"{len(predictions)} {kind}s ({shares}), written to {output}")
    if client.deployed_serving is not None:
        print(_serving_cost(client))
    return 0


def _check_columns(client: Client, config: Namespace) -> None:
    """Check that the network has what the further columns show.

    Raises:
        UserError: Probabilities in regression, or members of a network that is no ensemble.
    """
    if config.probabilities:
        require(client.spec.task == "classification", "--probabilities", "false for regression", True)
    if config.members:
        label = client.splits.label
        expected = f"false for {label}, whose {client.deployed_name} model is a single network"
        require(client.deployed_serving is not None, "--members", expected, True)


def _monitored_columns(trained: Trained, client: Client, policy: ExitPolicy | None) -> MonitoredColumns:
    """Return what `--monitoring` adds, with the local model after do-no-harm."""
    is_compared = trained.do_no_harm is not None and client.deployed_role != LOCAL
    return MonitoredColumns(client, trained.local_model(client) if is_compared else None, policy)


def _usable_policy(
    trained: Trained, client: Client, policy: ExitPolicy | None, label_prior: LabelPrior, group: str | None
) -> ExitPolicy | None:
    """Return the policy with which samples exit early; warn where there is none.

    Raises:
        UserError: The policy lacks the group, or the client cannot be served under the label prior.
    """
    if group is not None:
        policy_of_group(policy, group)
    if label_prior != TRAIN:
        check_label_prior(client, label_prior)
        if client.deployed_role != LOCAL:
            _warn_of_federated_network(trained, client)
        if policy is not None:
            # Both its thresholds and its guarantee are those of the uncorrected network.
            print_warning(
                f"--label_prior: the exit policy of {client.splits.label} is not used, because its guarantee does not"
                " hold for another label prior. All images take the last exit"
            )
        return None
    warn_without_guarantee(trained, client, policy)
    return policy


def _with_groups(
    policy: ExitPolicy | None, inputs: _Inputs, source: Path, group: str | None
) -> tuple[ExitPolicy | None, _Inputs]:
    """Return the policy of `--group`, or inputs with groups; warn of others.

    Raises:
        UserError: The inputs have the column, and a value of it is not `--group`.
    """
    if policy is None or not policy.group_by or policy.group_by in CLASSES:
        return policy, inputs
    column = policy.group_by
    values = input_values(source, column, inputs.names)
    if group is not None:
        others = [] if values is None else [value for value in values if value != group]
        if others:
            raise UserError(
                f"--group: expected the value of {column!r} in the inputs, got {shorten(repr(group))} where"
                f" {len(others)} of {inputs.size} have another one ({_names(others)}). Omit it: the column is read"
            )
        return policy.for_group(group), inputs
    if values is None or len(values) != inputs.size:
        if policy.needs_group:
            print_warning(
                f"--input: expected a column {column!r}, by whose values the exit policy has its thresholds, got none."
                " All samples take the last exit. Name the group by --group"
            )
        return policy, inputs
    known = {each.name for each in policy.groups}
    unknown = [value for value in values if value not in known]
    if unknown:
        effect = "take the last exit" if policy.needs_group else "can exit early: the guarantee does not cover them"
        print_warning(
            f"--input: {len(unknown)} of {len(values)} samples have a value of {column!r} that the exit policy does not"
            f" have ({_names(unknown)}) and {effect}"
        )
    return policy, inputs._replace(groups=values)


def _names(values: Sequence[str | None]) -> str:
    return listed(dict.fromkeys("none" if value is None else repr(shorten(value)) for value in values))


def _warn_of_federated_network(trained: Trained, client: Client) -> None:
    """Warn where the correction of a federated network to a prior is not safe."""
    serving = client.deployed_serving
    # A candidate is one network; its offsets are 0 if it is served as the server sent it.
    serves_average = serving is not None and serving.members in (("proxy",), ("global",)) and not serving.offsets.any()
    if trained.method.serves_average or serves_average:
        print_warning(
            f"--label_prior: {client.splits.label} serves the server's average of"
            f" {type(trained.method).__name__}, which was not trained on its class mix: the correction can lower"
            " the accuracy. Use train, or a method that trains the served network at the client"
        )
    if trained.do_no_harm is not None:
        print_warning(
            f"--label_prior: do_no_harm compared the uncorrected outputs of {client.splits.label}, and does not hold"
            " for another label prior"
        )


def _serving_cost(client: Client) -> str:
    """Describe members, FLOPs and latency of the ensemble that a client serves."""
    serving = client.deployed_serving
    assert serving is not None
    shape, network, private = client.samples.input_shape, client.deployed_model, client.networks["private"]
    x = torch.zeros(BATCH_SIZE, *shape).to(next(private.parameters()))
    kind = "ensemble of " if len(serving.members) > 1 else ""
    flops = network_flops(network, shape) / network_flops(private, shape)
    milliseconds, single = forward_milliseconds(network, x), forward_milliseconds(private, x)
    return (
        f"{kind}{', '.join(serving.members)}: {flops:.2f} times the FLOPs of the private model,"
        f" {milliseconds:.3g} ms per sample ({single:.3g} ms for the private model) in batches of {BATCH_SIZE}"
    )


def _read(data: FederatedDataModule, client: Client, path: Path, is_table: bool, skip_unreadable: bool) -> _Inputs:
    """Read new samples as the run reads its own, but for unreadable ones.

    Raises:
        UserError: If the file cannot be read, or does not have what the network takes.
    """
    shape = client.samples.input_shape
    if is_table:
        features = data.read_features(path, client.number)
        return _Inputs(torch.split(features, BATCH_SIZE), len(features), None)
    if len(shape) == 1:
        raise UserError(f"expected a .csv or .parquet table, as in training, got {shorten_path(path)}")
    images = read_images(path, replace(data.read_options, skip_unreadable=skip_unreadable), shape[0])
    if images.input_shape != shape:
        raise UserError(f"expected images of {shape} (channels, height, width), got {images.input_shape}")
    require_trained_bits(client.samples, images.inputs.dtype == np.uint8)
    for line in images.warnings:
        print_warning(line.replace("data.skip_unreadable", "--skip_unreadable"))
    batches = images.batches(BATCH_SIZE)
    if client.samples.inputs.dtype != torch.uint8:  # sites of 8 and of 16 bits were joined: digests must agree
        batches = map(scale, batches)
    return _Inputs(batches, len(images), images.names)


def _predictions(
    client: Client,
    policy: ExitPolicy | None,
    inputs: _Inputs,
    label_prior: LabelPrior,
    with_members: bool,
    monitored: MonitoredColumns | None,
) -> Iterable[Outputs]:
    """Return the outputs of each batch, corrected to the label prior."""
    batches = _outputs(client, policy, inputs, with_members, monitored)
    return batches if label_prior == TRAIN else _corrected(client, list(batches), label_prior)


@torch.no_grad()
def _outputs(
    client: Client,
    policy: ExitPolicy | None,
    inputs: _Inputs,
    with_members: bool,
    monitored: MonitoredColumns | None,
) -> Iterator[Outputs]:
    """Yield the outputs of each batch."""
    total, bar = -(-inputs.size // BATCH_SIZE), Console(stderr=True)
    is_quiet = not sys.stderr.isatty()
    start = 0
    for batch in track(inputs.batches, "predictions", total, console=bar, disable=is_quiet, transient=True):
        groups = None if inputs.groups is None else inputs.groups[start : start + len(batch)]
        start += len(batch)
        x, logits, exits, scores = deployed_outputs(client, policy, batch, groups)
        members = client.member_outputs(x, exits) if with_members else {}
        yield Outputs(logits, exits, scores, members, {} if monitored is None else monitored.of_batch(batch))


def _corrected(client: Client, batches: Sequence[Outputs], label_prior: LabelPrior) -> Iterator[Outputs]:
    """Yield the outputs corrected from the network's prior to another one."""
    source = network_label_prior(client)
    target = resolve_label_prior(label_prior, torch.cat([batch.logits for batch in batches]), source)
    if label_prior == ESTIMATED:
        # 9 digits: the sum passes the check of a list that is given to --label_prior.
        print(f"estimated label prior: [{', '.join(f'{value:.9f}' for value in target.tolist())}]")
    for batch in batches:
        adjusted = adjust_log_prior(batch.logits, source, target)
        yield batch._replace(logits=adjusted, scores=max_softmax_confidence(adjusted))
