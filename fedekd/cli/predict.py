"""`predict`: predict the targets of new samples with a finished run."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fedekd.atomic import atomic_file
from fedekd.cli.calibrate import client_choices, input_error, select_clients
from fedekd.cli.label_prior import (
    ESTIMATED,
    TRAIN,
    LabelPrior,
    check_label_prior,
    network_label_prior,
    parse_label_prior,
    resolve_label_prior,
)
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.data import FederatedDataModule
from fedekd.data.formats.table import is_table_file
from fedekd.data.unlabelled import read_images
from fedekd.early_exit.latency import forward_milliseconds
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_files import load_policy
from fedekd.early_exit.scoring import BATCH_SIZE, network_input
from fedekd.errors import UserError, print_warning, shorten_path
from fedekd.federation import Orchestrator
from fedekd.functional import adjust_log_prior, max_softmax_confidence
from fedekd.methods import Client
from fedekd.methods.client import ENSEMBLE
from fedekd.models import MultiExitNetwork, eval_mode, network_flops

COLUMNS = ("label", "class", "value", "exit", "score")
"""Columns after the number of the image, or of the row of a table, and the name of its file.

`class` only if classes have names; `value` for regression, which has no label and score.
"""


class _Inputs(NamedTuple):
    """New samples, as a network takes them, in batches."""

    batches: Iterable[Tensor]
    size: int
    names: list[str] | None


class _Outputs(NamedTuple):
    """Outputs of one batch: logits (B, C) or values (B, 1), exits (B,), scores (B,)."""

    logits: Tensor
    exits: Tensor
    scores: Tensor


def predict_parser() -> ArgumentParser:
    """Create the parser of `predict`."""
    parser = ArgumentParser(
        prog="orchestrator.py predict",
        usage="%(prog)s RUN --input FILE [--output predictions.csv] [--client K]",
        description="Predict classes or values of images or of the rows of a table with the network of one client of a"
        " finished run.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, nargs="?", default="", help="Folder of a finished run.")
    parser.add_argument(
        "--input",
        type=str,
        default="",
        help="A folder of images, a manifest, an .npz file, or a table; labels are not needed.",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="predictions.csv",
        help="CSV file with the columns image (row in a table), file, label, class, exit and score; value and exit in"
        " regression.",
    )
    parser.add_argument(
        "--client",
        type=str | None,
        default=None,
        help="Number of the client, or name of its site; optional for a run with one client.",
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
    """Run `predict RUN`; writes one CSV file atomically."""
    config = parse(predict_parser(), argv)
    if not config.run or not config.input:
        raise UserError("run and --input: expected both. Example: predict runs/NAME --input images.npz")
    output = Path(config.output)
    if output.suffix != ".csv" or output.is_dir():
        raise UserError(f"--output: expected the name of a .csv file, got {config.output!r}")
    label_prior = parse_label_prior(config.label_prior)
    is_table = is_table_file(Path(config.input).expanduser())
    orchestrator, _, _ = open_finished("predict", Path(config.run), in_process=True)
    clients = orchestrator.load_clients()
    if config.client is None and len(clients) > 1:
        raise UserError(f"--client: expected {client_choices(clients)}, got none")
    [client] = select_clients(clients, "0" if config.client is None else config.client)
    try:
        inputs = _read(orchestrator.data, client, Path(config.input).expanduser(), is_table)
    except UserError as error:
        raise input_error(error) from error
    policy = load_policy(Path(config.run), client.number)
    if label_prior != TRAIN:
        check_label_prior(client, label_prior)
        if client.deployed_role != "local":
            _warn_of_federated_network(orchestrator, client)
        if policy is not None:
            # Both its thresholds and its guarantee are those of the uncorrected network.
            print_warning(
                f"--label_prior: the exit policy of {client.splits.label} is not used, because its guarantee does not"
                " hold for another label prior. All images take the last exit"
            )
            policy = None
    elif policy is None and isinstance(client.deployed_model, MultiExitNetwork):
        print_warning(
            f"{client.splits.label} has no exit policy, all images take the last exit; for early exits run: calibrate"
            f" {config.run}"
        )
    if policy is not None and policy.has_no_guarantee:
        print_warning(f"the policy was calibrated with mode {policy.mode}, which has no guarantee")
    rows = list(_predictions(client, policy, inputs, label_prior))
    kind = "row" if is_table else "image"
    _write(output, kind, rows, inputs.names)
    counts = Counter(row["exit"] for row in rows)
    shares = ", ".join(f"exit {exit_}: {counts[exit_] / len(rows):.1%}" for exit_ in sorted(counts))
    print(f"{len(rows)} {kind}s ({shares}), written to {output}")
    if client.deployed_role == ENSEMBLE:
        print(_serving_cost(client))
    return 0


def _warn_of_federated_network(orchestrator: Orchestrator, client: Client) -> None:
    """Warn where the correction of a federated network to a prior is not safe."""
    if orchestrator.method.serves_average:
        print_warning(
            f"--label_prior: {client.splits.label} serves the server's average of"
            f" {type(orchestrator.method).__name__}, which was not trained on its class mix: the correction can lower"
            " the accuracy. Use train, or a method that trains the served network at the client"
        )
    if orchestrator.do_no_harm is not None:
        print_warning(
            f"--label_prior: do_no_harm compared the uncorrected outputs of {client.splits.label}, and does not hold"
            " for another label prior"
        )


def _serving_cost(client: Client) -> str:
    """Describe members, FLOPs and latency of the ensemble that a client serves."""
    assert client.serving is not None
    shape, network, private = client.samples.input_shape, client.deployed_model, client.networks["private"]
    x = torch.zeros(BATCH_SIZE, *shape).to(next(private.parameters()))
    flops = network_flops(network, shape) / network_flops(private, shape)
    milliseconds, single = forward_milliseconds(network, x), forward_milliseconds(private, x)
    return (
        f"ensemble of {', '.join(client.serving.members)}: {flops:.2f} times the FLOPs of the private model,"
        f" {milliseconds:.3g} ms per sample ({single:.3g} ms for the private model) in batches of {BATCH_SIZE}"
    )


def _read(data: FederatedDataModule, client: Client, path: Path, is_table: bool) -> _Inputs:
    """Read new samples as the run reads its own.

    Raises:
        UserError: If the file cannot be read, or does not have what the network takes.
    """
    shape = client.samples.input_shape
    if is_table:
        features = data.read_features(path, client.number)
        return _Inputs(torch.split(features, BATCH_SIZE), len(features), None)
    if len(shape) == 1:
        raise UserError(f"expected a .csv or .parquet table, as in training, got {shorten_path(path)}")
    images = read_images(path, data.read_options, shape[0])
    if images.input_shape != shape:
        raise UserError(f"expected images of {shape} (channels, height, width), got {images.input_shape}")
    for line in images.warnings:
        print_warning(line)
    return _Inputs(images.batches(BATCH_SIZE), len(images), images.names)


def _write(output: Path, kind: str, rows: Sequence[dict[str, Any]], names: Sequence[str] | None) -> None:
    """Write the predictions; rows of a table are numbered from 1."""
    text = io.StringIO(newline="")
    columns = [kind, *(["file"] if names is not None else []), *(name for name in COLUMNS if name in rows[0])]
    table = csv.DictWriter(text, columns, lineterminator="\n")
    table.writeheader()
    for index, row in enumerate(rows):
        file = {} if names is None else {"file": names[index]}
        table.writerow({kind: index + (kind == "row"), **file, **row})
    with atomic_file(output) as stream:
        stream.write(text.getvalue().encode())


def _predictions(
    client: Client, policy: ExitPolicy | None, inputs: _Inputs, label_prior: LabelPrior
) -> Iterator[dict[str, Any]]:
    """Yield the values of `COLUMNS` for each sample; exits are numbered from 1."""
    classes = client.samples.class_names
    is_named = classes != tuple(map(str, range(len(classes))))
    batches: Iterable[_Outputs] = _outputs(client, policy, inputs)
    if label_prior != TRAIN:
        batches = _corrected(client, list(batches), label_prior)
    for logits, exits, scores in batches:
        if client.spec.task == "regression":
            for value, exit_ in zip(logits[:, 0].tolist(), exits.tolist(), strict=True):
                yield {"value": float(f"{value:.6g}"), "exit": exit_ + 1}
            continue
        for label, exit_, score in zip(logits.argmax(dim=1).tolist(), exits.tolist(), scores.tolist(), strict=True):
            named = {"class": classes[label]} if is_named else {}
            yield {"label": label, **named, "exit": exit_ + 1, "score": round(score, 6)}


@torch.no_grad()
def _outputs(client: Client, policy: ExitPolicy | None, inputs: _Inputs) -> Iterator[_Outputs]:
    """Yield logits or values, exits from 0, and scores of each batch."""
    network = client.deployed_model
    total, bar = -(-inputs.size // BATCH_SIZE), Console(stderr=True)
    is_quiet = not sys.stderr.isatty()
    for batch in track(inputs.batches, "predictions", total, console=bar, disable=is_quiet, transient=True):
        x = network_input(network, batch)
        if policy is not None and isinstance(network, MultiExitNetwork):
            logits, exits, scores = policy.predict_with_exits(network, x, client.networks.get("proxy"))
        else:
            with eval_mode(network):
                outputs = network(x)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            logits = client.in_target_unit(outputs[-1])
            scores = max_softmax_confidence(logits)
            exits = torch.full((len(x),), len(outputs) - 1)
        if non_finite := int((~logits.isfinite().all(dim=1)).sum()):
            raise UserError(
                f"{client.splits.label}: expected finite outputs, got NaN or inf for {non_finite} of {len(x)} samples."
                " The training of its network diverged"
            )
        yield _Outputs(logits, exits, scores)


def _corrected(client: Client, batches: Sequence[_Outputs], label_prior: LabelPrior) -> Iterator[_Outputs]:
    """Yield the outputs corrected from the network's prior to another one."""
    source = network_label_prior(client)
    target = resolve_label_prior(label_prior, torch.cat([batch.logits for batch in batches]), source)
    if label_prior == ESTIMATED:
        # 9 digits: the sum passes the check of a list that is given to --label_prior.
        print(f"estimated label prior: [{', '.join(f'{value:.9f}' for value in target.tolist())}]")
    for logits, exits, _ in batches:
        adjusted = adjust_log_prior(logits, source, target)
        yield _Outputs(adjusted, exits, max_softmax_confidence(adjusted))
