"""The spec that all parts of a federation agree on, wherever they run."""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

from fedekd.data import ImageData
from fedekd.federation.options import RoundOptions
from fedekd.methods import ClientOptions, FederationSpec, Method
from fedekd.modules import TrainerFactory


class Sized(Protocol):
    """What a spec needs to know of the data."""

    batch_size: int
    eval_batch_size: int

    @property
    def images(self) -> ImageData:
        """Their shape and task; the images themselves are not looked at."""
        ...


def shared_specification(
    method: Method,
    data: Sized,
    client: ClientOptions,
    trainer: TrainerFactory,
    options: RoundOptions,
    seed: int,
    num_clients: int,
) -> FederationSpec:
    """How networks are built and trained, from the parts of a federation; the private model gets the method's exits."""
    images = data.images
    if method.exits is not None and client.exits is None:
        client = replace(client, exits=method.exits)
    return FederationSpec(
        task=images.task,
        in_channels=images.in_channels,
        image_size=images.image_size,
        num_outputs=images.num_outputs,
        batch_size=data.batch_size,
        eval_batch_size=data.eval_batch_size,
        seed=seed,
        client=client,
        trainer=trainer.resolve(),
        num_clients=num_clients,
        rounds=options.rounds,
    )
