"""Comparison of an export with the framework on a client's held-out inputs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedekd.data import FederatedDataModule, split_inputs, take_inputs
from fedekd.data.tables import transform
from fedekd.early_exit.deployed import deployed_outputs, exit_outputs
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE, network_input
from fedekd.errors import UserError
from fedekd.export.inputs import TablePreprocessing
from fedekd.export.served import OUTPUTS, Limit, ServedNetwork
from fedekd.functional import all_finite
from fedekd.methods import Client

Outputs = dict[str, npt.NDArray[Any]]
"""Arrays of all samples by the names of `OUTPUTS`."""

MOST_SAMPLES = 1000
"""Held-out samples that are compared, at regular steps."""

TOLERANCE = 1e-4
"""Largest difference of probabilities, or of values in units of the target scale."""

MOST_MARGIN = 1e-6
"""Largest margin of an exported threshold."""

TIE = 1e-5
"""A score this close to a threshold may fall on either side of it: round-off of float32 logits."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out inputs of a client, and what the framework returns for them.

    Attributes:
        raw: Raw inputs, shape (n, ...), as the exported model takes them.
        outputs: Outputs of the framework.
        exits: Probabilities, or values, of each of the E exits, shape (n, E, C) or (n, E, 1).
        near: True where the score of an exit before the last is within `TIE` of a threshold, shape (n, E - 1).
    """

    raw: Tensor
    outputs: Outputs
    exits: npt.NDArray[np.floating]
    near: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.raw)


def held_out_inputs(client: Client, served: ServedNetwork, most: int | None = None) -> Tensor:
    """Return raw inputs of a client's validation and test splits, shape (n, ...).

    Args:
        client: Client of a finished run.
        served: Its served network. For a table it converts features back to rows, and one row per column is added in
            which this column has no value.
        most: Number of samples, taken at regular steps; None takes all. Default None.

    Raises:
        UserError: If a weight is not finite, as after diverged training.
    """
    if not all_finite(client.deployed_model.state_dict().values()):
        raise UserError(
            f"{client.splits.label}: expected a network with finite weights, got NaN or inf. Its training diverged"
        )
    splits = client.splits
    indices = torch.cat([splits.validation, splits.test])
    indices = indices if len(indices) else splits.train
    steps = torch.linspace(0, len(indices) - 1, min(len(indices), most or len(indices))).round().long()
    inputs = take_inputs(client.samples.inputs, indices[steps].sort().values)
    raw = torch.cat([batch.cpu() for batch in split_inputs(inputs, BATCH_SIZE)])
    if isinstance(served.preprocessing, TablePreprocessing):
        raw = _with_missing(served.preprocessing.rows_of(raw))
    return raw


def held_out(
    data: FederatedDataModule, client: Client, policy: ExitPolicy | None, served: ServedNetwork, raw: Tensor
) -> HeldOut:
    """Run the framework on held-out inputs of a client.

    Args:
        data: Data module of the run, which has the preprocessing of tables.
        client: Client of a finished run.
        policy: Its exit policy, if any.
        served: Its served network.
        raw: Held-out inputs, shape (n, ...).

    Raises:
        UserError: If an output is not finite.
    """
    is_table = isinstance(served.preprocessing, TablePreprocessing)
    inputs = transform(data.transformer(client.number), raw.numpy()) if is_table else raw
    return HeldOut(
        raw, framework_outputs(client, policy, inputs), _outputs_of_exits(client, inputs), near_thresholds(served, raw)
    )


def _with_missing(rows: Tensor) -> Tensor:
    """Append one row per column without its value."""
    count = rows.shape[1]
    missing = rows[torch.arange(count) % len(rows)].clone()
    missing[torch.arange(count), torch.arange(count)] = torch.nan
    return torch.cat([rows, missing])


def framework_outputs(client: Client, policy: ExitPolicy | None, inputs: Tensor) -> Outputs:
    """Return the outputs of `predict` for inputs of a client.

    Args:
        client: Client of a finished run.
        policy: Its exit policy, if any.
        inputs: Images as in `Samples.inputs`, or features, shape (n, ...).

    Raises:
        UserError: If an output is not finite.
    """
    batches = [deployed_outputs(client, policy, batch) for batch in torch.split(inputs, BATCH_SIZE)]
    _, logits, exits, scores = (torch.cat(tensors).cpu() for tensors in zip(*batches, strict=True))
    if client.spec.task == "regression":
        return {"value": logits[:, 0].double().numpy(), "exit": exits.numpy() + 1}
    tensors = (logits.argmax(dim=1), logits.softmax(dim=1), scores, exits + 1, logits)
    return {name: tensor.numpy() for name, tensor in zip(OUTPUTS["classification"], tensors, strict=True)}


def _outputs_of_exits(client: Client, inputs: Tensor) -> npt.NDArray[np.floating]:
    """Return probabilities, or values, of all exits, (n, E, C) or (n, E, 1)."""
    network, parts = client.deployed_model, []
    for batch in torch.split(inputs, BATCH_SIZE):
        outputs = torch.stack(exit_outputs(client, network_input(network, batch)), dim=1)
        parts.append(outputs if client.spec.task == "regression" else outputs.softmax(dim=2))
    return np.asarray(torch.cat(parts).cpu().numpy())


@torch.no_grad()
def _exit_scores(served: ServedNetwork, raw: Tensor) -> npt.NDArray[np.float64]:
    """Return the scores of the exits before the last, shape (n, E - 1)."""
    rows = []
    for batch in torch.split(raw, BATCH_SIZE):
        x = served.preprocessing(batch)
        proxy = None if served.proxy is None else served.proxy(x)
        rows.append(torch.stack([served.score(logits, proxy) for logits in served.network(x)[:-1]], dim=1))
    return np.asarray(torch.cat(rows).numpy())


def round_off_margins(served: ServedNetwork, raw: Tensor) -> tuple[float, ...]:
    """Return how much lower the exported thresholds are, shape (E - 1,).

    A threshold is the score of a sample, which another runtime rounds to either side. The margin is half of the
    distance to the next lower score, at most 1e-6: the held-out samples take the exits of the exact threshold.

    Args:
        served: Deployed model without margins.
        raw: Held-out inputs, shape (n, ...).
    """
    if not served.early_exits:
        return ()
    scores, margins = _exit_scores(served, raw), []
    for (threshold, bound, _), values in zip(served.early_exits, scores.T, strict=True):
        gaps = [2 * MOST_MARGIN]
        for limit in {*_numbers(threshold), *_numbers(bound)}:
            lower = values[values < limit - _round_off(limit)]
            gaps.append(limit - lower.max(initial=-np.inf))
        margins.append(float(min(gaps)) / 2)
    return tuple(margins)


def _round_off(score: float) -> float:
    """Return by how much the scores of a sample differ between runtimes.

    Softmax scales errors of the logits by p (1 - p): less near 1, but for the spacing of 6e-8 of float32.
    """
    return max(3e-8, min(3e-7, 1e-5 * (1.0 - score)) * max(1.0, abs(score))) if math.isfinite(score) else 0.0


def near_thresholds(served: ServedNetwork, raw: Tensor) -> npt.NDArray[np.bool_]:
    """Return which exits have a score within `TIE` of a limit, shape (n, E - 1)."""
    near = np.zeros((len(raw), len(served.early_exits)), dtype=bool)
    if not served.early_exits:
        return near
    scores = _exit_scores(served, raw)
    for exit_, (threshold, bound, _) in enumerate(served.early_exits):
        for limit in {*_numbers(threshold), *_numbers(bound)}:
            near[:, exit_] |= np.abs(scores[:, exit_] - limit) <= TIE
    return near


def _numbers(limit: Limit) -> tuple[float, ...]:
    """Return the limit of an exit, or those of all classes."""
    return limit if isinstance(limit, tuple) else (limit,)


@dataclass(frozen=True)
class Difference:
    """Difference of an export and the framework on n samples.

    Attributes:
        samples: n.
        largest: Largest difference of probabilities, or of values in the unit of the targets.
        exits: Samples with another exit, which have a score within `TIE` of a threshold up to the first of both exits.
        labels: Samples with another label.
    """

    samples: int
    largest: float
    exits: int
    labels: int

    def __str__(self) -> str:
        exits = "exits equal" if not self.exits else f"exits equal but for {self.exits} within {TIE:g} of a threshold"
        labels = "labels equal" if not self.labels else f"other labels: {self.labels}"
        return f"{self.samples:,} held-out samples, largest difference {self.largest:.2g}, {labels}, {exits}"


def compare(name: str, outputs: Outputs, expected: HeldOut, target_scale: float = 1.0) -> Difference:
    """Compare the outputs of an export with those of the framework.

    Probabilities and labels, or values, are compared at the exit of the export; scores where the exits are equal.

    Args:
        name: Name of the file, for the error.
        outputs: Outputs of the export for `expected.raw`.
        expected: Held-out inputs and outputs of the framework.
        target_scale: Unit of the tolerance in regression.

    Raises:
        UserError: If an exit differs without a score within `TIE` of a threshold at it or before it, a value or score
            differs by more than `TOLERANCE`, or an output of any sample is not finite.
    """
    framework = expected.outputs
    for output, values in outputs.items():
        if non_finite := int((~np.isfinite(values.reshape(len(values), -1)).all(axis=1)).sum()):
            raise UserError(
                f"{name}: expected finite {output}, got NaN or infinity for {non_finite} of {len(expected)} held-out"
                " samples. Nothing was written"
            )
    is_other = outputs["exit"] != framework["exit"]
    first = np.minimum(outputs["exit"], framework["exit"])
    is_before = np.arange(1, expected.near.shape[1] + 1) <= first[:, None]
    ties = int((is_other & (expected.near & is_before).any(axis=1)).sum())
    if unexplained := int(is_other.sum()) - ties:
        raise UserError(
            f"{name}: expected the exits of the framework, got another one for {unexplained} of"
            f" {len(expected)} held-out samples. Nothing was written"
        )
    at_exit = expected.exits[np.arange(len(expected)), outputs["exit"] - 1].astype(float)
    key = "probabilities" if "probabilities" in framework else "value"
    gaps = np.abs(outputs[key].astype(float).reshape(at_exit.shape) - at_exit).max(axis=1)
    labels = 0
    if "score" in framework:
        gaps = np.maximum(gaps, np.where(is_other, 0.0, np.abs(outputs["score"] - framework["score"])))
        labels = int((outputs["label"] != at_exit.argmax(axis=1)).sum())
    largest = float(gaps.max(initial=0.0))
    difference = Difference(len(expected), largest, ties, labels)
    tolerance = TOLERANCE * (target_scale if key == "value" else 1.0)
    if largest > tolerance:
        raise UserError(
            f"{name}: expected the {key} of the framework up to {tolerance:g}, got a difference of {largest:.3g} on"
            f" {len(expected)} held-out samples. Nothing was written"
        )
    return difference


def module_outputs(module: Callable[[Tensor], tuple[Tensor, ...]], task: Any, raw: Tensor) -> Outputs:
    """Return the outputs of a torch module or program for raw inputs, in batches."""
    with torch.no_grad():
        parts = [module(batch) for batch in _batches(raw)]
    arrays = (torch.cat(tensors).numpy() for tensors in zip(*parts, strict=True))
    return dict(zip(OUTPUTS[task], arrays, strict=True))


def session_outputs(session: Any, raw: Tensor, single: bool) -> Outputs:
    """Return the outputs of an onnxruntime session for raw inputs.

    Args:
        session: An `onnxruntime.InferenceSession`.
        raw: Raw inputs, shape (n, ...).
        single: One sample per run; otherwise batches of different sizes.
    """
    [name] = (value.name for value in session.get_inputs())
    names = [value.name for value in session.get_outputs()]
    batches = torch.split(raw, 1) if single else _batches(raw)
    parts = [session.run(None, {name: batch.numpy()}) for batch in batches]
    return {key: np.concatenate(arrays) for key, arrays in zip(names, zip(*parts, strict=True), strict=True)}


def _batches(raw: Tensor) -> list[Tensor]:
    """Return one sample, then batches of 128: a program for one size fails."""
    return [raw[:1], *torch.split(raw[1:], BATCH_SIZE)] if len(raw) > 1 else [raw]


def open_session(content: bytes) -> Any:
    """Open an ONNX file in onnxruntime with one thread, without messages."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def exit_times(
    full: Any, early: Any, raw: Tensor, exits: npt.NDArray[np.int64], runs: int = 300
) -> Mapping[str, float]:
    """Measure milliseconds per sample in onnxruntime, per exit.

    Args:
        full: Session of the file for batches; it runs with one sample, too.
        early: Session of the file with exits.
        raw: Raw inputs, shape (n, ...).
        exits: Exit of each sample, from 1.
        runs: Measured runs of each session; both alternate, to cancel the load of the machine.

    Returns:
        Medians: `full`; `exit N` of each exit; and `early`, their mean over the measured samples.
    """
    [name] = (value.name for value in early.get_inputs())
    times: dict[str, list[float]] = {"full": []}
    for run in range(-10, runs):  # ten for warm-up
        index = run % runs * len(raw) // runs  # regular steps: the samples may be sorted
        sample = {name: raw[index : index + 1].numpy()}
        start = time.perf_counter()
        full.run(None, sample)
        middle = time.perf_counter()
        early.run(None, sample)
        end = time.perf_counter()
        if run >= 0:
            times["full"].append(1000 * (middle - start))
            times.setdefault(f"exit {exits[index]}", []).append(1000 * (end - middle))
    medians = {key: statistics.median(values) for key, values in sorted(times.items())}
    # Not the mean of all times, which single interruptions of the process dominate.
    early = sum(len(times[key]) * medians[key] for key in times if key != "full") / runs
    return medians | {"early": early}
