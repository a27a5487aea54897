"""FedAvg in fluke.

Run as `python -m perf.peers.fluke_run CLIENTS IMAGES SIZE ROUNDS`.
"""

from __future__ import annotations

import warnings

from fluke import DDict, FlukeENV
from fluke.algorithms.fedavg import FedAVG
from fluke.data import DataSplitter, DummyDataContainer, FastDataLoader
from fluke.utils import FederationObserver

from perf.peers.workload import BATCH, EPOCHS, RATE, Clock, Workload


class RoundObserver(FederationObserver):
    """Observer that notes the end of each round."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def end_round(self, round: int) -> None:
        """See `FederationObserver`."""
        self.clock.tick()


def main() -> None:
    """Train, and print the time of a round."""
    warnings.simplefilter("ignore")
    workload, clock = Workload.from_arguments(), Clock()
    environment = FlukeENV()
    environment.set_seed(0)
    environment.set_device("cpu")
    environment.set_inmemory(True)
    environment.set_eval_cfg(pre_fit=False, post_fit=False, server=False, locals=False)
    images, labels = workload.scaled()
    loaders = [
        FastDataLoader(x, y, num_labels=10, batch_size=min(BATCH, len(x)), shuffle=True)
        for x, y in zip(images, labels, strict=True)
    ]
    data = DummyDataContainer(loaders, [None] * workload.clients, None, num_classes=10)
    options = DDict(
        model=workload.network(),
        client=DDict(
            batch_size=BATCH,
            local_epochs=EPOCHS,
            loss="CrossEntropyLoss",
            optimizer=DDict(name="SGD", lr=RATE),
            scheduler=DDict(name="StepLR", step_size=1, gamma=1),
        ),
        server=DDict(weighted=True),
    )
    federation = FedAVG(workload.clients, DataSplitter(data), options)
    federation.set_callbacks(RoundObserver(clock))
    federation.run(workload.rounds, 1.0)
    clock.report(federation.server.model.parameters())


if __name__ == "__main__":
    main()
