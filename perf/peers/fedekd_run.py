"""FedAvg in fedekd.

Run as `python -m perf.peers.fedekd_run CLIENTS IMAGES SIZE ROUNDS`.
Each round is saved if a checkpoint is due, and evaluated on one test image per ten training images, which the other
contenders do not.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fedekd.federation import Orchestrator, RoundOptions, SilentObserver
from fedekd.federation.engines.performance import gc_frozen
from fedekd.methods import ClientOptions, FedAvg
from fedekd.modules import TrainerFactory
from perf.peers.workload import EPOCHS, RATE, Clock, Workload


class RoundObserver(SilentObserver):
    """Observer that notes the end of each round: the beginning of the next one."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def round_started(self, round_idx: int) -> None:
        """See `Observer`; no round is before round 0."""
        if round_idx:
            self.clock.tick()

    def warn(self, text: str) -> None:
        """Print nothing."""


def main() -> None:
    """Train, and print the time of a round."""
    workload, clock = Workload.from_arguments(), Clock()
    saving = {"checkpoint_every": 0.0} if workload.every_round else {}
    network = {"class_path": "fedekd.models.PrivateCNN"}  # built for the images' size
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": RATE}}
    with TemporaryDirectory() as folder:
        torch.save(workload.network().state_dict(), Path(folder) / "initial.pt")
        federation = Orchestrator(
            FedAvg(),
            workload.data(),
            ClientOptions(
                local_epochs=EPOCHS,
                private_model=network,
                proxy_model=network,
                private_weights=str(Path(folder) / "initial.pt"),
                optimizer=optimizer,
            ),
            TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
            RoundOptions(rounds=workload.rounds, **saving),
            output=Path(folder) / "run",
            baseline_dir=Path(folder) / "local",
            observer=RoundObserver(clock),
        )
        with gc_frozen():
            federation.run()
    clock.report(federation.method.server_state["model"].values())


if __name__ == "__main__":
    main()
