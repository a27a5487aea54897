"""`predict`: predict the targets of new samples with a finished run."""

from __future__ import annotations

import csv
import io
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fedekd.atomic import atomic_file
from fedekd.cli.calibrate import client_choices, select_clients
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.data.formats.table import is_table_file
from fedekd.data.unlabelled import read_images
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_files import load_policy
from fedekd.early_exit.scoring import BATCH_SIZE, network_input
from fedekd.errors import UserError, print_warning
from fedekd.functional import max_softmax_confidence
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork, eval_mode

COLUMNS = ("image", "label", "exit", "score")

#: Columns for regression; a table has `row`, from 1, in place of `image`.
VALUE_COLUMNS = ("image", "value", "exit")


def predict_parser() -> ArgumentParser:
    """Create the parser of `predict`."""
    parser = ArgumentParser(
        prog="orchestrator.py predict",
        usage="%(prog)s RUN --input images.npz [--output predictions.csv] [--client K]",
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
        help="An .npz file with an array images, or in MedMNIST's layout; or a .csv or .parquet table.",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="predictions.csv",
        help="CSV file with the columns image (row in a table), label, exit and score; value and exit in regression.",
    )
    parser.add_argument(
        "--client",
        type=str | None,
        default=None,
        help="Number of the client, or name of its site; optional for a run with one client.",
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
    is_table = is_table_file(Path(config.input))
    images = None if is_table else _read(read_images, Path(config.input))
    orchestrator, _, _ = open_finished("predict", Path(config.run), in_process=True)
    clients = orchestrator.load_clients()
    if config.client is None and len(clients) > 1:
        raise UserError(f"--client: expected {client_choices(clients)}, got none")
    [client] = select_clients(clients, "0" if config.client is None else config.client)
    shape = client.samples.input_shape
    if images is None:
        images = _read(orchestrator.data.read_features, Path(config.input), client.number)
    elif len(shape) == 1:
        raise UserError(f"--input: expected a .csv or .parquet table, as in training, got {config.input}")
    if images.shape[1:] != shape:
        raise UserError(f"--input: expected images of {shape} (channels, height, width), got {tuple(images.shape[1:])}")
    policy = load_policy(Path(config.run), client.number)
    if policy is None and isinstance(client.deployed_model, MultiExitNetwork):
        print_warning(
            f"{client.splits.label} has no exit policy, all images take the last exit; for early exits run: calibrate"
            f" {config.run}"
        )
    if policy is not None and policy.has_no_guarantee:
        print_warning(f"the policy was calibrated with mode {policy.mode}, which has no guarantee")
    rows = list(_predictions(client, policy, images))
    kind = "row" if is_table else "image"
    _write(output, kind, VALUE_COLUMNS if client.spec.task == "regression" else COLUMNS, rows)
    counts = Counter(row[1] for row in rows)
    shares = ", ".join(f"exit {exit_}: {counts[exit_] / len(rows):.1%}" for exit_ in sorted(counts))
    print(f"{len(rows)} {kind}s ({shares}), written to {output}")
    return 0


def _read(read: Callable[..., Tensor], *arguments: Any) -> Tensor:
    try:
        return read(*arguments)
    except UserError as error:
        raise UserError(f"--input: {str(error).removeprefix('data.dataset: ')}") from error


def _write(output: Path, kind: str, columns: Sequence[str], rows: Sequence[tuple[Any, ...]]) -> None:
    """Write the predictions; rows of a table are numbered from 1."""
    first = 1 if kind == "row" else 0
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow((kind, *columns[1:]))
    table.writerows((index, *row) for index, row in enumerate(rows, start=first))
    with atomic_file(output) as file:
        file.write(text.getvalue().encode())


@torch.no_grad()
def _predictions(client: Client, policy: ExitPolicy | None, inputs: Tensor) -> Iterator[tuple[Any, ...]]:
    """Yield label, exit (from 1) and score of each sample; in regression value and exit."""
    network = client.deployed_model
    is_quiet = not sys.stderr.isatty()
    batches = torch.split(inputs, BATCH_SIZE)
    for batch in track(batches, "predictions", console=Console(stderr=True), disable=is_quiet, transient=True):
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
        if client.spec.task == "regression":
            for value, exit_ in zip(logits[:, 0].tolist(), exits.tolist(), strict=True):
                yield float(f"{value:.6g}"), exit_ + 1
            continue
        for label, exit_, score in zip(logits.argmax(dim=1).tolist(), exits.tolist(), scores.tolist(), strict=True):
            yield label, exit_ + 1, round(score, 6)
