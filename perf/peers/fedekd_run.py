"""FedAvg in fedekd.

Run as `python -m perf.peers.fedekd_run CLIENTS IMAGES SIZE ROUNDS`.
Each round is saved if a checkpoint is due, and evaluated on one test image per ten training images, which the other
contenders do not.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from fedekd.data import FederatedDataModule, Samples
from fedekd.federation import Orchestrator, RoundOptions, SilentObserver
from fedekd.federation.engines.performance import gc_frozen
from fedekd.methods import ClientOptions, FedAvg
from fedekd.modules import TrainerFactory
from perf.peers.workload import BATCH, EPOCHS, RATE, Clock, Workload


class RoundObserver(SilentObserver):
    """Notes the beginning of each round, which is the end of the one before."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def round_started(self, round_idx: int) -> None:
        """See `Observer`; round 0 only sends the initial weights."""
        if round_idx:
            self.clock.tick()

    def warn(self, text: str) -> None:
        """Print nothing."""


def main() -> None:
    """Train, and print the time of a round."""
    workload, clock = Workload.from_arguments(), Clock()
    few = max(1, round(workload.images / 10))
    images, labels = workload.samples(workload.images + 2 * few)
    total = workload.images + 2 * few
    data = FederatedDataModule(
        "fashionmnist",
        num_clients=workload.clients,
        partition="iid",
        min_samples=2,
        batch_size=BATCH,
        fractions=(workload.images / total, few / total, few / total),
    )
    data.adopt(Samples("fashionmnist", images.flatten(0, 1), labels.flatten(), "classification", 10))
    network = {"class_path": "fedekd.models.PrivateCNN"}  # built for the images' size
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": RATE}}
    client = ClientOptions(local_epochs=EPOCHS, private_model=network, proxy_model=network, optimizer=optimizer)
    with TemporaryDirectory() as folder:
        federation = Orchestrator(
            FedAvg(),
            data,
            client,
            TrainerFactory(accelerator="cpu", precision="32-true", threads=1),
            RoundOptions(rounds=workload.rounds),
            output=Path(folder) / "run",
            baseline_dir=Path(folder) / "local",
            observer=RoundObserver(clock),
        )
        with gc_frozen():
            federation.run()
    sizes = {len(splits.train) for splits in data.clients}
    assert sizes == {workload.images}, sizes
    clock.report()


if __name__ == "__main__":
    main()
