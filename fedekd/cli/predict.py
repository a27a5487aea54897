"""`predict`: classify images with a finished run, each leaving at the exit where its policy lets it."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.progress import track
from torch import Tensor

from fedekd.atomic import atomic_file
from fedekd.cli.calibrate import chosen_clients
from fedekd.configuration.load_run import open_finished
from fedekd.configuration.options import parse
from fedekd.data.unlabelled import read_images
from fedekd.early_exit.policies import load_policy
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE, prepared
from fedekd.errors import UserError
from fedekd.functional import max_softmax_confidence
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork
from fedekd.models.modes import eval_mode

COLUMNS = ("image", "label", "exit", "score")


def predict_parser() -> ArgumentParser:
    """The parser of `predict`."""
    parser = ArgumentParser(
        prog="orchestrator.py predict",
        usage="%(prog)s RUN --input images.npz [--output predictions.csv] [--client K]",
        description="Classify images with the network of one client of a finished run.",
        allow_abbrev=False,
        exit_on_error=False,
    )
    parser.add_argument("run", type=str, nargs="?", default="", help="The folder of a finished run.")
    parser.add_argument(
        "--input", type=str, default="", help="An .npz file with an array images, or MedMNIST's splits."
    )
    parser.add_argument(
        "--output", type=str, default="predictions.csv", help="The CSV file: image, label, exit, score."
    )
    parser.add_argument(
        "--client", type=int | None, default=None, help="Whose network; a run of one client has but one."
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `predict RUN`; writes one CSV file, whole or not at all."""
    config = parse(predict_parser(), argv)
    if not config.run or not config.input:
        raise UserError("predict needs a run and images, as in: predict runs/NAME --input images.npz")
    output = Path(config.output)
    if output.is_dir():
        raise UserError(f"--output {output} is a folder; the name of a CSV file is needed")
    if output.suffix != ".csv":
        raise UserError(f"--output is {output}, and must end in .csv: a file of that name is replaced")
    try:
        images = read_images(Path(config.input))
    except UserError as error:
        raise UserError(f"--input: {str(error).removeprefix('data.dataset: ')}") from error
    orchestrator, _, _ = open_finished("predict", Path(config.run), in_process=True)
    clients = orchestrator.load_clients()
    if config.client is None and len(clients) > 1:
        raise UserError(f"--client must be given: this run has the clients 0..{len(clients) - 1}")
    client = chosen_clients(clients, config.client or 0)[0]
    if images.shape[1:] != client.images.pixels.shape[1:]:
        given, own = tuple(images.shape[1:]), tuple(client.images.pixels.shape[1:])
        raise UserError(f"--input has images of {given}, and the network takes {own} (channels, height, width)")
    if client.spec.task == "regression":
        raise UserError(f"{config.run} is a regression run; predict gives the classes of a classifier")
    policy = load_policy(Path(config.run), client.number)
    network = client.deployed_model
    if policy is None and isinstance(network, MultiExitNetwork):
        hint = f"calibrate {config.run} lets images leave early"
        print(
            f"warning: client {client.number} has no exit policy, so all images go to the last exit; {hint}",
            file=sys.stderr,
        )
    if policy is not None and policy.has_no_guarantee:
        print(f"warning: the policy is of mode {policy.mode}, which promises nothing", file=sys.stderr)
    lines = list(_predictions(client, policy, images))
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    table.writerows(lines)
    with atomic_file(output) as file:
        file.write(text.getvalue().encode())
    exits = torch.tensor([line[2] for line in lines])
    shares = ", ".join(
        f"exit {number}: {(exits == number).double().mean():.1%}" for number in sorted(set(exits.tolist()))
    )
    print(f"{len(lines)} images ({shares}), written to {output}")
    return 0


@torch.no_grad()
def _predictions(client: Client, policy: ExitPolicy | None, images: Tensor) -> Iterator[tuple[int, int, int, float]]:
    """Number, label, exit (from 1) and score of each image."""
    network = client.deployed_model
    place = 0
    batches = torch.split(images, BATCH_SIZE)
    quiet = not sys.stderr.isatty()
    for chosen in track(batches, "images", console=Console(stderr=True), disable=quiet, transient=True):
        x = prepared(network, chosen)
        if policy is not None and isinstance(network, MultiExitNetwork):
            departures = policy.predict_with_exits(network, x, client.networks.get("proxy"))
            logits, exits, scores = departures
        else:
            with eval_mode(network):
                outputs = network(x)
            outputs = [outputs] if isinstance(outputs, Tensor) else outputs
            logits, scores = outputs[-1], max_softmax_confidence(outputs[-1])
            exits = torch.full((len(x),), len(outputs) - 1)
        if diverged := int((~logits.isfinite().all(dim=1)).sum()):
            raise UserError(
                f"the outputs of client {client.number}'s network are not finite for {diverged} of {len(x)} images: its"
                " training has diverged, and it classifies nothing"
            )
        for label, exit_, score in zip(logits.argmax(dim=1).tolist(), exits.tolist(), scores.tolist(), strict=True):
            yield place, label, exit_ + 1, round(score, 6)
            place += 1
