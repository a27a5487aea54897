"""Exit policies: calibrated thresholds, their guarantee and their file format."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.early_exit.fingerprint import FingerprintCheck
from fedekd.early_exit.inference import EarlyExitOutput, early_exit_forward, evaluated_exits, exit_index
from fedekd.errors import UserError, describe_error
from fedekd.functional import AGREEMENT, SCORES
from fedekd.models import MultiExitNetwork

#: Version of the file layout; other versions are rejected. Since 4 the file ends with its SHA-256.
FORMAT = 4


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
        required_samples: For a closed exit the estimated number of calibration samples that would open it; None if it
            is open, or if the rule has no estimate.
        network: Fingerprint of the calibrated network; empty accepts any network.
        versions: Versions of fedekd and torch at calibration.
        gamma: Weight of the disagreement in the score `agreement`.
        proxy: Fingerprint of the proxy for the score `agreement`; empty accepts any proxy.
        simultaneous_clients: Number of clients whose guarantees hold at once with probability `confidence`.

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
        if self.thresholds[-1] != -math.inf:
            raise UserError(f"exit policy: expected -inf as the threshold of the last exit, got {self.thresholds[-1]}")

    @property
    def num_exits(self) -> int:
        """Number of exits E, the last included."""
        return len(self.thresholds)

    @property
    def uses_proxy(self) -> bool:
        """Whether the score is computed with a proxy."""
        return self.score == AGREEMENT

    @property
    def has_no_guarantee(self) -> bool:
        """Whether samples can exit early without any guarantee."""
        return not any(self.certified) and any(threshold < math.inf for threshold in self.thresholds[:-1])

    @property
    def evaluated(self) -> tuple[bool, ...]:
        """Whether the head of each exit is evaluated, shape (E,)."""
        return evaluated_exits(self.thresholds, self.search_bounds)

    def assign(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """Assign samples to exits, shape (n,), from their scores, shape (n, E)."""
        return exit_index(scores, self.thresholds, self.search_bounds)

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
        return early_exit_forward(network, x, self.thresholds, self.search_bounds, self.score, proxy, self.gamma)

    def to_json(self) -> str:
        """Serialize without loss; `from_json` is the inverse."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.init}
        values["versions"] = dict(self.versions)
        for name in ("thresholds", "search_bounds"):  # JSON has no infinity
            values[name] = [value if math.isfinite(value) else str(value) for value in values[name]]
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
            for name in ("thresholds", "search_bounds"):
                values[name] = [float(value) for value in values[name]]
            arguments: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**arguments)
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
