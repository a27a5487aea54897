"""What a client serves: one of its networks, or a combination of several."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Role of the ensemble that a client serves in place of its private model.
ENSEMBLE = "ensemble"

#: Role of the local model that do-no-harm has deployed.
LOCAL = "local"

#: Role of the candidate that do-no-harm has deployed in place of what the method serves.
CANDIDATE = "candidate"


@dataclass(frozen=True)
class Serving:
    """Combination of a client's networks at serving time.

    See `fedekd.models.Ensemble`.

    Attributes:
        members: Roles of the M networks, the private model first if it is a member.
        weights: Weight of each member, shape (M,).
        offsets: Added to the outputs of each member, shape (M, C).
    """

    members: tuple[str, ...]
    weights: Tensor
    offsets: Tensor

    def to_state(self) -> dict[str, Any]:
        """Return plain values."""
        return vars(self) | {"members": [*self.members]}

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> Serving:
        """Return the combination of `to_state`."""
        return cls(tuple(values["members"]), values["weights"], values["offsets"])


@dataclass(frozen=True)
class Candidate:
    """Model that do-no-harm has chosen among those that the method declares.

    Attributes:
        name: Its name in `Method.candidates`.
        serving: How it is served; None is the private model.
    """

    name: str
    serving: Serving | None

    def to_state(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "serving": None if self.serving is None else self.serving.to_state()}

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> Candidate:
        """Return the candidate of `to_state`."""
        serving = values["serving"]
        return cls(values["name"], None if serving is None else Serving.from_state(serving))
