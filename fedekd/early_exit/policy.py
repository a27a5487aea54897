"""When an image may leave a network early, and what is promised of those that do."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from fedekd.atomic import atomic_file
from fedekd.early_exit.fingerprint import network_fingerprint, weights_state
from fedekd.early_exit.inference import EarlyExitOutput, early_exit_forward, evaluated_exits
from fedekd.errors import UserError
from fedekd.functional import AGREEMENT, SCORES
from fedekd.models import MultiExitNetwork

#: Of the file's layout; a file of another layout is refused.
FORMAT = 2


def exit_index(
    scores: npt.NDArray[np.float64], thresholds: Sequence[float], search_bounds: Sequence[float]
) -> npt.NDArray[np.int64]:
    """Return the exit of each sample from the scores of all exits; equals `early_exit_forward`, which computes fewer.

    A sample leaves at the first exit whose threshold its score reaches. One that reaches an exit's band but not its
    threshold leaves at the last: the exits in between are promised for samples below the band only.

    Args:
        scores: Confidence at each exit, shape (n, E); NaN reaches no threshold.
        thresholds: Of each exit, shape (E,); the last is -inf, and inf lets nobody leave.
        search_bounds: Of each exit, at most its threshold, shape (E,).

    Returns:
        Exits 0..E-1, shape (n,).
    """
    samples, exits = scores.shape
    chosen = np.full(samples, exits - 1)
    eligible = np.ones(samples, dtype=bool)
    for exit_, (threshold, search_bound) in enumerate(zip(thresholds[:-1], search_bounds[:-1], strict=True)):
        if search_bound == math.inf:  # it is never asked, so that its score does not matter: it may be NaN
            continue
        chosen[eligible & (scores[:, exit_] >= threshold)] = exit_
        eligible &= scores[:, exit_] < search_bound
    return chosen


@dataclass(frozen=True)
class ExitPolicy:
    """The thresholds of a network's exits, how they were calibrated, and what is promised of them.

    Attributes:
        thresholds: A sample leaves at the first exit whose score reaches its threshold; one for each of the E exits,
            inf where an exit is closed, -inf for the last.
        search_bounds: A sample that reaches an exit's band but not its threshold leaves at the last exit.
        certified: For each exit, whether its error rate among those who leave there is promised to be at most
            `alpha`; never for the last.
        alpha: The error rate.
        delta: With probability 1 - delta over the calibration samples all promises hold at once.
        mode: Which rule chose the thresholds.
        score: Which confidence is compared with the thresholds, a name of `fedekd.functional.SCORES`.
        samples: Calibration samples.
        tuning_samples: Samples on which the order of the tests was fixed.
        leaving: Calibration samples that leave at each exit.
        errors: How many of those are wrong.
        needed: For a closed exit about how many calibration samples would open it; None where it is open, where no
            number would, or where the rule cannot tell.
        network: Fingerprint of the network that was calibrated; empty for none.
        versions: Of fedekd and torch, at calibration.
        gamma: Of the score `agreement`.
        proxy: For `agreement`, the fingerprint of the proxy that gives the second opinion; empty for none.
        together: How many clients' promises, this one among them, hold all at once: with probability 1 - together *
            delta.
    """

    thresholds: tuple[float, ...]
    search_bounds: tuple[float, ...]
    certified: tuple[bool, ...]
    alpha: float
    delta: float
    mode: str
    score: str = "max_softmax"
    samples: int = 0
    tuning_samples: int = 0
    leaving: tuple[int, ...] = ()
    errors: tuple[int, ...] = ()
    needed: tuple[int | None, ...] = ()
    network: str = ""
    versions: Mapping[str, str] = field(default_factory=dict, hash=False)
    gamma: float = 1.0
    proxy: str = ""
    together: int = 1
    _verified: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        exits = len(self.thresholds)
        if not exits or len(self.search_bounds) != exits or len(self.certified) != exits:
            raise UserError(
                f"an exit policy has {exits} thresholds, {len(self.search_bounds)} bands and {len(self.certified)}"
                " certificates; each exit needs one of each"
            )
        if any(math.isnan(value) for value in (*self.thresholds, *self.search_bounds)):
            raise UserError("an exit policy has a threshold or band that is no number")
        for place, (search_bound, threshold) in enumerate(
            zip(self.search_bounds, self.thresholds, strict=True), start=1
        ):
            if search_bound > threshold:
                raise UserError(f"exit {place} has the band {search_bound:g} above its threshold {threshold:g}")
        if self.score not in SCORES:
            raise UserError(f"an exit policy has the score {self.score!r}, which is not known")
        if not all(isinstance(flag, bool) for flag in self.certified):
            raise UserError(f"an exit policy has the certificates {self.certified}; true or false is needed")
        if not isinstance(self.together, int) or self.together < 1:
            raise UserError(f"an exit policy is one of {self.together!r} that hold together; at least 1 is needed")
        if self.thresholds[-1] != -math.inf:
            raise UserError(f"the last exit's threshold is {self.thresholds[-1]}, and must be -inf: all leave there")

    def __getstate__(self) -> dict[str, Any]:
        """What travels to another process: not which network was recognized in this one."""
        return {**self.__dict__, "_verified": {}}

    @property
    def num_exits(self) -> int:
        """E, the last exit included."""
        return len(self.thresholds)

    @property
    def uses_proxy(self) -> bool:
        """Whether the score is one that a proxy has a part in."""
        return self.score == AGREEMENT

    @property
    def has_no_guarantee(self) -> bool:
        """Whether images may leave early, and nothing is promised of them."""
        return not any(self.certified) and any(threshold < math.inf for threshold in self.thresholds[:-1])

    @property
    def evaluated(self) -> tuple[bool, ...]:
        """Which exits' heads are computed: those that let somebody leave, or keep somebody from leaving later."""
        return evaluated_exits(self.thresholds, self.search_bounds)

    def assign(self, scores: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
        """The exit at which each sample leaves, (n,), from its scores at all exits, (n, E)."""
        return exit_index(scores, self.thresholds, self.search_bounds)

    def require(self, network: MultiExitNetwork, proxy: nn.Module | None = None) -> None:
        """Hold a network to be the one that was calibrated.

        Its weights are hashed the first time, and again when a part or a tensor was replaced or written to, or anything
        was trained. Of what is written to `tensor.data` in place only a policy that is read anew takes notice.

        Raises:
            UserError: If it is another, or has another number of exits; or the proxy is another, or missing.
        """
        if network.num_exits != self.num_exits:
            raise UserError(f"the exit policy is for {self.num_exits} exits, and the network has {network.num_exits}")
        self._recognize("network", network, self.network)
        if self.uses_proxy:
            if proxy is None:
                raise UserError("the exit policy asks a proxy for its opinion, and none was given")
            self._recognize("proxy", proxy, self.proxy)

    def _recognize(self, role: str, network: nn.Module, fingerprint: str) -> None:
        if not fingerprint:
            return
        state = weights_state(network)
        known, known_state = self._verified.get(role, (None, None))
        if known is not None and known() is network and known_state == state:
            return
        found = network_fingerprint(network)
        if found != fingerprint:
            raise UserError(
                f"the exit policy was calibrated for {role} {fingerprint[:12]}, and this is {found[:12]}: its promise"
                f" holds for that {role} alone; calibrate this one"
            )
        self._verified[role] = weakref.ref(network), state

    def predict(self, network: MultiExitNetwork, x: Tensor, proxy: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """Logits and exit of each image; samples that have left cost nothing more.

        Args:
            network: The network that was calibrated; it is run in evaluation mode.
            x: Images, shape (B, C, H, W).
            proxy: The proxy that was calibrated with it, where the policy asks one.

        Returns:
            Logits (B, classes), and exits 0..E-1, int64, (B,).

        Raises:
            UserError: If it is another network.
        """
        departures = self.predict_with_exits(network, x, proxy)
        return departures.logits, departures.exits

    def predict_with_exits(
        self, network: MultiExitNetwork, x: Tensor, proxy: nn.Module | None = None
    ) -> EarlyExitOutput:
        """As `predict`, with the scores, too."""
        self.require(network, proxy)
        return early_exit_forward(network, x, self.thresholds, self.search_bounds, self.score, proxy, self.gamma)

    def to_json(self) -> str:
        """As text; `from_json` gives the same policy back, to the last digit."""
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        values["versions"] = dict(self.versions)
        for name in ("thresholds", "search_bounds"):  # JSON has no infinity
            values[name] = [_as_text(value) for value in values[name]]
        return json.dumps({"format": FORMAT, **values}, indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> ExitPolicy:
        """The inverse of `to_json`.

        Raises:
            UserError: If it is no such text, or of another version's layout.
        """
        try:
            values = json.loads(text)
            layout = values.pop("format")
            if layout != FORMAT:
                raise UserError(f"an exit policy has layout {layout}, and this version reads {FORMAT}; calibrate anew")
            for name in ("thresholds", "search_bounds"):
                values[name] = [float(value) for value in values[name]]
            fitting: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            return cls(**fitting)
        except UserError:
            raise
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"this is no exit policy: {' '.join(str(error).split())}") from error

    def save(self, path: Path) -> None:
        """Write the policy, whole or not at all."""
        with atomic_file(path) as file:
            file.write(self.to_json().encode())

    @classmethod
    def load(cls, path: Path) -> ExitPolicy:
        """Read what `save` wrote.

        Raises:
            UserError: If there is no such file, or no policy in it.
        """
        try:
            return cls.from_json(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise UserError(f"{path}: there is no such file") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: this is no exit policy: it is not text in UTF-8") from error


def _as_text(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)
