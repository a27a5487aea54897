"""FedAvg in pfl-research.

Run as `python -m perf.peers.pfl_run CLIENTS IMAGES SIZE ROUNDS`. It visits the batches of a client in the same order in
every epoch; the other contenders shuffle.
"""

from __future__ import annotations

from itertools import cycle

import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.hyperparam.base import NNEvalHyperParams, NNTrainHyperParams
from pfl.metrics import Metrics
from pfl.model.pytorch import PyTorchModel
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from perf.peers.workload import BATCH, EPOCHS, RATE, Clock, Workload


class Trained(nn.Module):
    """The network with the loss and metrics that pfl-research calls."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def loss(self, x: Tensor, y: Tensor, eval: bool = False) -> Tensor:
        """Return the cross-entropy of a batch."""
        return cross_entropy(self.network(x), y)

    def metrics(self, x: Tensor, y: Tensor, eval: bool = False) -> dict[str, float]:
        """Return no metrics."""
        return {}


class RoundCallback(TrainingProcessCallback):
    """Callback that notes the end of each round."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def after_central_iteration(self, aggregate_metrics: Metrics, model: PyTorchModel, *, central_iteration: int):
        """See `TrainingProcessCallback`."""
        self.clock.tick()
        return False, Metrics()


def main() -> None:
    """Train, and print the time of a round."""
    workload, clock = Workload.from_arguments(), Clock()
    images, labels = workload.scaled()
    numbers = cycle(range(workload.clients))
    data = FederatedDataset(lambda number: Dataset([images[number], labels[number]]), lambda: next(numbers))
    network = Trained(workload.network())
    model = PyTorchModel(
        network, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0)
    )
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(workload.rounds, 10**6, workload.clients, 0),
        backend=SimulatedBackend(data, data),
        model=model,
        model_train_params=NNTrainHyperParams(
            local_num_epochs=EPOCHS, local_learning_rate=RATE, local_batch_size=BATCH
        ),
        model_eval_params=NNEvalHyperParams(local_batch_size=BATCH),
        callbacks=[RoundCallback(clock)],
    )
    clock.report(network.parameters())


if __name__ == "__main__":
    main()
