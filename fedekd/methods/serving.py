"""What a client serves: one of its networks, or a combination of several."""

from __future__ import annotations

import re
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

_EXIT = re.compile(r"exit_([1-9][0-9]{0,2})")


def exit_of_candidate(name: str) -> int | None:
    """Return the number of the exit that a name such as `exit_2` means, from 1.

    None for another name.
    """
    match = _EXIT.fullmatch(name)
    return None if match is None else int(match[1])


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
    """Model that do-no-harm has chosen among those that it compares.

    Attributes:
        name: Its name in `Method.candidates`, or that of an exit.
        serving: How it is served; None is the private model. For the name of an exit the private model, also as a
            member of the combination, has the first stages only.
    """

    name: str
    serving: Serving | None

    @property
    def depth(self) -> int | None:
        """Number of the private model's stages that are served; None for all."""
        return exit_of_candidate(self.name)

    def to_state(self) -> dict[str, Any]:
        """Return plain values."""
        return {"name": self.name, "serving": None if self.serving is None else self.serving.to_state()}

    @classmethod
    def from_state(cls, values: Mapping[str, Any]) -> Candidate:
        """Return the candidate of `to_state`."""
        serving = values["serving"]
        return cls(values["name"], None if serving is None else Serving.from_state(serving))
