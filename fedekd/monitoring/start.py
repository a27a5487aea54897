"""Settings of a monitor, fixed by its first call with valid arrivals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from fedekd.atomic import atomic_file, seal_json, unseal_json
from fedekd.early_exit.policy import ExitPolicy
from fedekd.errors import UserError, describe_error, shorten, shorten_path
from fedekd.monitoring.policies import exit_limits, policy_hashes, policy_settings, with_closed
from fedekd.tasks import Task

Kind = Literal["exit", "do_no_harm", "coverage", "drift"]

#: Version of the file layout; other versions are rejected.
FORMAT = 1

#: Hexadecimal digits of the hash of an input that are compared; two inputs share them with probability 2^-64.
SAMPLE_DIGITS = 16


@dataclass(frozen=True)
class Quantity:
    """One quantity that a monitor follows, with its null hypothesis.

    Each hypothesis is about all arrivals, given those before:

    - `exit`: the error rate among the samples that take the exit is at most `limit`, the target risk.
    - `do_no_harm`: the mean loss of the federated model exceeds that of the local model by at most `limit`, the margin.
    - `coverage`: the prediction set or interval omits the target with a probability of at most `limit`.
    - `drift`: the values of a column are exchangeable with those of the reference sample; `limit` is unused.

    Args:
        kind: See above.
        name: `exit 1`, `do_no_harm`, `coverage`, or the column of the arrivals for `drift`.
        limit: Largest value under the hypothesis.
        exit: For `exit` its number, from 1; else 0.
    """

    kind: Kind
    name: str
    limit: float = 0.0
    exit: int = 0


@dataclass(frozen=True)
class MonitorStart:
    """Settings of a monitor; every result is a function of them and of the arrivals.

    They are written by the first call whose arrivals are valid. Confidence and coverage must be chosen before the
    arrivals are seen: a choice that depends on them voids the guarantee.

    Guarantee: with probability of at least `confidence` no quantity whose hypothesis is true ever has an alarm, for
    every length of the stream and every number of calls. Exact for every length (Ville); the level 1 - confidence is
    divided by the number of quantities (Bonferroni). An alarm of a drift test refers to arrivals that are exchangeable
    with `reference`, an independent sample that was not used for training.

    Args:
        task: `classification` or `regression`.
        client: Number of the client.
        name: Name of its site; empty without sites.
        network: Fingerprint of the deployed network.
        is_labelled: Whether arrivals have targets.
        quantities: Followed quantities, at least 1.
        confidence: See above, in (0, 1).
        policy: `policy_settings` of the exit policy at the start; None without a policy.
        limits: Its `exit_limits`; empty without a policy.
        class_names: Names of the classes; empty in regression.
        clip: Regression: largest difference of squared errors in the do-no-harm comparison.
        reference: For each drift test, values of the reference sample.
        used: Hashes of the samples of training, selection and calibration.
        seed: Seed of the random numbers that break ties of drift tests.
        run: SHA-256 of the stored state of the client, which identifies the run; empty accepts any.
    """

    task: Task
    client: int
    name: str
    network: str
    is_labelled: bool
    quantities: tuple[Quantity, ...]
    confidence: float
    policy: Mapping[str, Any] | None = None
    limits: tuple[tuple[float, ...], ...] = ()
    class_names: tuple[str, ...] = ()
    clip: float = 1.0
    reference: Mapping[str, tuple[float, ...]] | None = None
    used: frozenset[str] = frozenset()
    seed: int = 0
    run: str = ""

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise UserError(f"confidence: expected a number in (0, 1), got {self.confidence}")
        if not self.quantities:
            raise UserError("monitor: expected at least 1 quantity to follow, got 0")
        for quantity in self.quantities:
            if quantity.kind not in get_args(Kind):
                raise UserError(f"monitor: expected a quantity of {', '.join(get_args(Kind))}, got {quantity.kind!r}")

    @property
    def level(self) -> float:
        """Largest probability of a false alarm of one quantity."""
        # Rounded, because 1 - 0.9 is not 0.1 in floating point.
        return (round(1.0 - self.confidence, 12) or 1.0 - self.confidence) / len(self.quantities)

    def require_policy(self, policy: ExitPolicy | None) -> None:
        """Check that a policy is that of the start, but for exits that were closed.

        Raises:
            UserError: It is the policy of another network or guarantee, has other thresholds, or is missing.
        """
        if policy is None:
            if self.limits:
                raise UserError("policy: expected the exit policy of the start of the monitor, got none. Restore it")
            return
        if policy.network and policy.network != self.network:
            raise UserError(
                f"policy: expected that of the monitored network {self.network[:12]}, got one of {policy.network[:12]}."
                " Start a new monitor with another --state"
            )
        settings = policy_settings(policy)
        for name, value in (self.policy or {}).items():
            if settings[name] != value:
                raise UserError(
                    f"policy: expected {name} {shorten(str(value))} as at the start of the monitor, got"
                    f" {shorten(str(settings[name]))}. Start a new monitor with another --state"
                )
        closed = tuple(e for e, reason in enumerate(policy.closed) if reason)
        if exit_limits(policy) != with_closed(self.limits, closed):
            raise UserError(
                "policy: expected the thresholds of the start of the monitor, got others. Start a new monitor with"
                " another --state"
            )

    @cached_property
    def policy_hashes(self) -> frozenset[str]:
        """Allowed values of the column `policy`."""
        return policy_hashes(self.policy, self.limits)

    def save(self, path: Path) -> None:
        """Write the settings atomically."""
        values = asdict(self) | {"used": sorted(self.used)}
        values["limits"] = list(map(_to_json, self.limits))
        values["reference"] = {name: _to_json(each) for name, each in (self.reference or {}).items()}
        with atomic_file(path) as file:
            file.write(seal_json({"format": FORMAT, **values}))

    @classmethod
    def load(cls, path: Path) -> MonitorStart:
        """Read the settings that `save` wrote.

        Raises:
            UserError: The file is damaged or has another version of the layout.
        """
        try:
            values: dict[str, Any] = unseal_json(path.read_bytes())
            if (layout := values.pop("format")) != FORMAT:
                raise UserError(f"expected format {FORMAT}, got {layout!s:.20}. Start a new monitor")
            values["limits"] = tuple(tuple(map(float, row)) for row in values["limits"])
            values["quantities"] = tuple(Quantity(**each) for each in values["quantities"])
            values["reference"] = {name: tuple(map(float, each)) for name, each in values["reference"].items()}
            values |= {"class_names": tuple(values["class_names"]), "used": frozenset(values["used"])}
            return cls(**values)
        except UserError as error:
            raise UserError(f"{shorten_path(path)}: {error}") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{shorten_path(path)}: expected the start of a monitor, got invalid content: {describe_error(error)}."
                " Restore it, or start a new monitor with another --state"
            ) from error


def _to_json(numbers: Sequence[float]) -> list[float | str]:
    """Return numbers with infinities, which JSON does not have, as texts."""
    return [value if math.isfinite(value) else str(value) for value in numbers]
