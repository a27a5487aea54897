"""Exit policies: calibrated thresholds, their guarantee and their file format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.early_exit.fingerprint import FingerprintCheck
from fedekd.early_exit.grouping import PREDICTED_CLASS, Grouping
from fedekd.early_exit.inference import EarlyExitOutput, Limits, early_exit_forward, evaluated_exits, exit_index
from fedekd.errors import UserError, describe_error, listed, shorten
from fedekd.functional import AGREEMENT, SCORES
from fedekd.models import MultiExitNetwork

#: Version of the file layout; others are rejected.
FORMAT = 5


@dataclass(frozen=True)
class GroupExits:
    """Exits of one group of samples.

    Args:
        name: Name of the group.
        thresholds: As in `ExitPolicy`, shape (E,).
        search_bounds: As in `ExitPolicy`, shape (E,).
        certified: Whether the guarantee covers the group at each exit, shape (E,).
        samples: Number of calibration samples of the group; for a predicted class, the samples that exit with this
            prediction.
        exit_counts: Calibration samples of the group that take each exit, shape (E,).
        error_counts: Errors among them, shape (E,).
        required_samples: For a closed exit the estimated least number of calibration samples of the group, or None,
            shape (E,).
        tested_samples: As in `ExitPolicy`, shape (E,).
    """

    name: str
    thresholds: tuple[float, ...]
    search_bounds: tuple[float, ...]
    certified: tuple[bool, ...]
    samples: int = 0
    exit_counts: tuple[int, ...] = ()
    error_counts: tuple[int, ...] = ()
    required_samples: tuple[int | None, ...] = ()
    tested_samples: tuple[int, ...] = ()


@dataclass(frozen=True)
class ExitPolicy:
    r"""Calibrated exit thresholds of one network, with their guarantee.

    Guarantee, if `certified` is true for at least one exit. Population: the distribution of the calibration samples.
    Target: at each certified exit the error rate among the samples that take it is at most `target_risk`. Confidence:
    all certified exits of `simultaneous_clients` clients hold at once with probability at least `confidence` over the
    calibration samples. Assumptions and reference: see `SelectiveRiskCalibrator`.

    Args:
        thresholds: Threshold of each of the E exits, shape (E,): a sample takes the first exit whose threshold its
            score reaches. inf closes an exit; the last is -inf.
        search_bounds: Lowest threshold that was tested at each exit, at most its threshold, shape (E,). A sample that
            reaches the bound but not the threshold takes the last exit.
        certified: Whether the guarantee covers each exit, shape (E,); the last is never covered.
        target_risk: Maximum error rate among the samples that take an exit.
        confidence: Probability that all guarantees hold at once.
        mode: Calibration rule, a key of `MODES`.
        score: Confidence score, a key of `fedekd.functional.SCORES`.
        samples: Number of calibration samples.
        tuning_samples: Number of samples on which the sequence of tests was fixed.
        exit_counts: Calibration samples that take each exit, shape (E,).
        error_counts: Errors among them, shape (E,).
        required_samples: For a closed exit the estimated least number of calibration samples that it needs; None if it
            is open, or if the rule has no estimate.
        network: Fingerprint of the calibrated network; empty accepts any network.
        versions: Versions of fedekd and torch at calibration.
        gamma: Weight of the disagreement in the score `agreement`.
        proxy: Fingerprint of the proxy for the score `agreement`; empty accepts any proxy.
        simultaneous_clients: Number of clients whose guarantees hold at once with probability `confidence`.
        group_by: `true_class`, `predicted_class` or a column of the data: the guarantee holds for each of its groups,
            all at once; empty without groups.
        shared_thresholds: Whether `thresholds` hold for all groups. Otherwise the thresholds in `groups` apply, and
            `thresholds` close all exits: a sample of an unknown group takes the last exit.
        groups: Exits of each group.
        group_classes: Number of the class of each group, shape (groups,); empty for a column and for classes 0, 1, ...
        tested_samples: For a group, its calibration samples at each exit; with shared thresholds, those of any group.
            They are counted whether they reach the exit or not, and `required_samples` refers to them. Shape (E,);
            empty if `required_samples` refers to `samples`.
        unit: Column of the data, such as the patient: one sample of each of its values was drawn for calibration; empty
            if all samples are independent.
        closed: Reason for each exit that `close` closed after calibration, else an empty text, shape (E,); empty
            if none was closed.

    Raises:
        UserError: Values are inconsistent.
    """

    thresholds: tuple[float, ...]
    search_bounds: tuple[float, ...]
    certified: tuple[bool, ...]
    target_risk: float
    confidence: float
    mode: str
    score: str = "max_softmax"
    samples: int = 0
    tuning_samples: int = 0
    exit_counts: tuple[int, ...] = ()
    error_counts: tuple[int, ...] = ()
    required_samples: tuple[int | None, ...] = ()
    network: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    gamma: float = 1.0
    proxy: str = ""
    simultaneous_clients: int = 1
    group_by: str = ""
    shared_thresholds: bool = False
    groups: tuple[GroupExits, ...] = ()
    unit: str = ""
    closed: tuple[str, ...] = ()
    group_classes: tuple[int, ...] = ()
    tested_samples: tuple[int, ...] = ()
    _check: FingerprintCheck = field(default_factory=FingerprintCheck, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        num_exits = len(self.thresholds)
        if not num_exits or len(self.search_bounds) != num_exits or len(self.certified) != num_exits:
            raise UserError(
                "exit policy: expected as many thresholds as search_bounds and certified flags, at least 1 each, got"
                f" {num_exits}, {len(self.search_bounds)} and {len(self.certified)}"
            )
        if any(math.isnan(value) for value in (*self.thresholds, *self.search_bounds)):
            raise UserError("exit policy: expected numbers as thresholds and search_bounds, got NaN")
        for number, (bound, threshold) in enumerate(zip(self.search_bounds, self.thresholds, strict=True), start=1):
            if bound > threshold:
                raise UserError(
                    f"exit policy: expected a search bound of at most the threshold {threshold:g} at exit {number}, got"
                    f" {bound:g}"
                )
        if self.score not in SCORES:
            raise UserError(f"exit policy: expected a score of {', '.join(SCORES)}, got {self.score!r}")
        if not all(isinstance(flag, bool) for flag in self.certified):
            raise UserError(f"exit policy: expected true or false as certified flags, got {self.certified}")
        if not isinstance(self.simultaneous_clients, int) or self.simultaneous_clients < 1:
            raise UserError(
                f"exit policy: expected simultaneous_clients of at least 1, got {self.simultaneous_clients!r}"
            )
        if self.closed and len(self.closed) != num_exits:
            raise UserError(f"exit policy: expected {num_exits} reasons of closed exits, got {len(self.closed)}")
        if self.thresholds[-1] != -math.inf:
            raise UserError(f"exit policy: expected -inf as the threshold of the last exit, got {self.thresholds[-1]}")
        if bool(self.group_by) != bool(self.groups):
            raise UserError(f"exit policy: expected groups of {self.group_by!r}, got {len(self.groups)} groups")
        for group in self.groups:
            try:  # the same checks as without groups
                replace(self, **_exits_of(group), group_by="", groups=(), shared_thresholds=False)
            except UserError as error:
                raise UserError(f"{error} (group {group.name!r})") from error

    @property
    def num_exits(self) -> int:
        """Number of exits E, the last included."""
        return len(self.thresholds)

    @property
    def uses_proxy(self) -> bool:
        """True if the score is computed with a proxy."""
        return self.score == AGREEMENT

    @property
    def has_no_guarantee(self) -> bool:
        """True if samples can exit early without any guarantee."""
        return not self.is_certified and any(threshold < math.inf for threshold in self.thresholds[:-1])

    @property
    def is_certified(self) -> bool:
        """True if the guarantee covers at least one exit of at least one group."""
        return any(self.certified) or any(any(group.certified) for group in self.groups)

    @property
    def open_exits(self) -> tuple[bool, ...]:
        """True for each exit before the last that is open for some group, shape (E - 1,)."""
        rows = [self.thresholds, *(group.thresholds for group in self.groups)]
        return tuple(min(column) < math.inf for column in zip(*rows, strict=True))[:-1]

    @property
    def grouping(self) -> Grouping | None:
        """How samples are grouped; None without groups."""
        if not self.group_by:
            return None
        names = tuple(group.name for group in self.groups)
        return Grouping(self.group_by, names, self.shared_thresholds, self.group_classes)

    @property
    def needs_group(self) -> bool:
        """True if the thresholds of a sample depend on its value in a column."""
        return bool(self.group_by) and not self.shared_thresholds and self.group_by != PREDICTED_CLASS

    @property
    def limits(self) -> tuple[Limits, Limits]:
        """Thresholds and search bounds, shape (E,); (E, C) if they depend on the class."""
        if self.group_by != PREDICTED_CLASS or self.shared_thresholds:
            return self.thresholds, self.search_bounds
        rows = [[group.thresholds for group in self.groups], [group.search_bounds for group in self.groups]]
        thresholds, search_bounds = (tuple(zip(*row, strict=True)) for row in rows)
        return thresholds, search_bounds

    @property
    def evaluated(self) -> tuple[bool, ...]:
        """True for each exit whose head is evaluated, shape (E,)."""
        return evaluated_exits(*self.limits)

    def close(self, exit_: int, reason: str) -> ExitPolicy:
        """Return a policy with one more closed exit.

        Samples that would take it take the last exit, because the search bound remains. So the samples of all other
        early exits, and their guarantees, are unchanged.

        Args:
            exit_: Index of an exit before the last.
            reason: Why it is closed, one line.

        Returns:
            The policy. Its calibration samples of the exit count for the last exit, at which their errors are unknown
            and not counted.
        """
        if not 0 <= exit_ < self.num_exits - 1:
            raise ValueError(f"exit_: expected an index in 0..{self.num_exits - 2}, got {exit_}")
        reasons = list(self.closed or ("",) * self.num_exits)
        reasons[exit_] = reason
        groups = tuple(replace(group, **_without_exit(group, exit_)) for group in self.groups)
        return replace(self, **_without_exit(self, exit_), groups=groups, closed=tuple(reasons))

    def assign(
        self, scores: npt.NDArray[np.float64], groups: npt.NDArray[np.int64] | None = None
    ) -> npt.NDArray[np.int64]:
        """Assign samples to exits, shape (n,), from their scores, shape (n, E).

        Args:
            scores: Scores of all exits.
            groups: Number of the group of each sample at each exit, see `Grouping.index`; required where the thresholds
                depend on it, else all samples take the last exit.
        """
        if groups is None or not self.groups or self.shared_thresholds:
            return exit_index(scores, self.thresholds, self.search_bounds)
        tables = [
            np.asarray([getattr(group, name) for group in (*self.groups, self)])  # the last closes, also at index -1
            for name in ("thresholds", "search_bounds")
        ]
        exits = np.arange(self.num_exits)[:, None]
        thresholds, search_bounds = (list(table[groups.T, exits]) for table in tables)
        return exit_index(scores, thresholds, search_bounds)

    def for_group(self, name: str) -> ExitPolicy:
        """Return the policy of one group, whose thresholds need no group.

        Args:
            name: Name of a group of a policy with thresholds per group.

        Raises:
            UserError: The policy has no such group.
        """
        if name not in self._by_group:
            known = f"one of {listed(self._by_group)}" if self._by_group else "none, because the policy needs no group"
            raise UserError(f"group: expected {known}, got {shorten(repr(name))}")
        return self._by_group[name]

    @cached_property
    def _by_group(self) -> dict[str, ExitPolicy]:
        if not self.needs_group:
            return {}
        policies = {}
        for group in self.groups:
            policy = replace(self, **_exits_of(group), groups=(group,), shared_thresholds=True)
            object.__setattr__(policy, "_check", self._check)  # the networks are hashed once
            policies[group.name] = policy
        return policies

    def require(self, network: MultiExitNetwork, proxy: nn.Module | None = None) -> None:
        """Check that the network, and the proxy, are the calibrated ones.

        Weights are hashed at the first call and after each change; see `FingerprintCheck` for what counts as a change.

        Args:
            network: Network with E exits.
            proxy: Proxy for the score `agreement`.

        Raises:
            UserError: Network or proxy has another fingerprint or another number of exits, or the proxy is missing.
        """
        if network.num_exits != self.num_exits:
            raise UserError(f"exit policy: expected a network with {self.num_exits} exits, got {network.num_exits}")
        self._check.require("network", network, self.network)
        if self.uses_proxy:
            if proxy is None:
                raise UserError("exit policy: expected a proxy for the score 'agreement', got None")
            self._check.require("proxy", proxy, self.proxy)

    def predict(self, network: MultiExitNetwork, x: Tensor, proxy: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Classify images; samples that have exited are not computed further.

        Args:
            network: The calibrated network; it runs in evaluation mode.
            x: Images, shape (B, C, H, W).
            proxy: The proxy that was used at calibration, for the score `agreement`.

        Returns:
            Logits, shape (B, classes), and exits 0..E-1, int64, shape (B,).

        Raises:
            UserError: Network or proxy is not the calibrated one.
        """
        output = self.predict_with_exits(network, x, proxy)
        return output.logits, output.exits

    def predict_with_exits(
        self, network: MultiExitNetwork, x: Tensor, proxy: nn.Module | None = None
    ) -> EarlyExitOutput:
        """Classify images as `predict` does, and return the scores as well."""
        self.require(network, proxy)
        return early_exit_forward(network, x, *self.limits, self.score, proxy, self.gamma)

    def to_json(self) -> str:
        """Serialize without loss; `from_json` is the inverse."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        values["versions"] = dict(self.versions)
        values["groups"] = [vars(group).copy() for group in self.groups]
        for name in ("closed", "group_classes", "tested_samples"):  # the same bytes as before there were such fields
            if not values[name]:
                del values[name]
        for part in (values, *values["groups"]):
            for name in ("thresholds", "search_bounds"):  # JSON has no infinity
                part[name] = [value if math.isfinite(value) else str(value) for value in part[name]]
        return seal_json({"format": FORMAT, **values}).decode()

    @classmethod
    def from_json(cls, text: str) -> ExitPolicy:
        """Deserialize the text of `to_json`.

        Raises:
            UserError: The text is not a valid policy, does not match its checksum, or has another version of the
                layout.
        """
        try:
            layout = json.loads(text)["format"]
            if layout != FORMAT:
                raise UserError(f"exit policy: expected format {FORMAT}, got {layout!s:.20}. Run `calibrate` again")
            values = unseal_json(text.encode())
            del values["format"]
            values["groups"] = [GroupExits(**_from_json(group)) for group in values["groups"]]
            return cls(**_from_json(values))
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            reason = describe_error(error)
            raise UserError(f"exit policy: invalid content: {reason}. Run `calibrate` again") from error

    def save(self, path: Path) -> None:
        """Write the policy atomically."""
        with atomic_file(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> ExitPolicy:
        """Read a policy that `save` wrote.

        Raises:
            UserError: The file does not exist or is not a valid policy.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{path}: file not found") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: exit policy: invalid content: not UTF-8 text. Run `calibrate` again") from error


def _without_exit(exits: ExitPolicy | GroupExits, closed: int) -> dict[str, Any]:
    """Return the fields that change with a closed exit, whose search bound remains."""
    counts, errors = list(exits.exit_counts), list(exits.error_counts)
    if counts:
        counts[-1] += counts[closed]
        counts[closed] = errors[closed] = 0
    return {
        "thresholds": tuple(math.inf if e == closed else value for e, value in enumerate(exits.thresholds)),
        "certified": tuple(flag and e != closed for e, flag in enumerate(exits.certified)),
        "exit_counts": tuple(counts),
        "error_counts": tuple(errors),
    }


def _exits_of(group: GroupExits) -> dict[str, Any]:
    """Return the fields that a group and a policy have in common."""
    return {name: value for name, value in vars(group).items() if name != "name"}


def _from_json(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return fields with tuples and infinities, which JSON has as lists and texts."""
    limits = {name: [float(value) for value in values[name]] for name in ("thresholds", "search_bounds")}
    return {key: tuple(value) if isinstance(value, list) else value for key, value in ({**values, **limits}).items()}
