"""FedAvg in Flower's simulation, with one Ray actor.

Run as `python -m perf.peers.flower_run CLIENTS IMAGES SIZE ROUNDS`. CPU time and memory are those of this process and
all processes of Ray; memory is read at the end of each round, a shared page counted once.
"""

from __future__ import annotations

import os
from functools import cache

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation
from torch import Tensor

from perf.peers.workload import Clock, Workload, train
from perf.process_tree import cpu_seconds, memory_of

client_app = ClientApp()


class TreeClock(Clock):
    """Clock of this process and its descendants."""

    def cpu(self) -> float:
        """See `Clock`."""
        return cpu_seconds(os.getpid())

    def memory(self) -> float:
        """See `Clock`."""
        memory = memory_of(os.getpid())
        return memory.own + memory.files


@cache
def scaled(clients: int, images: int, size: int) -> tuple[Tensor, Tensor]:
    """Return `Workload.scaled`, once per process."""
    torch.set_num_threads(1)
    return Workload(clients, images, size, 0).scaled()


@client_app.train()
def visit(message: Message, context: Context) -> Message:
    """Train a client on the global model."""
    setting = [int(message.content["config"][name]) for name in ("clients", "images", "size")]
    number = int(context.node_config["partition-id"])
    x, y = (tensor[number] for tensor in scaled(*setting))
    network = Workload(*setting, 0).network()
    network.load_state_dict(message.content["arrays"].to_torch_state_dict())
    train(network, x, y)
    metrics = MetricRecord({"num-examples": len(x)})
    return Message(RecordDict({"arrays": ArrayRecord(network.state_dict()), "metrics": metrics}), reply_to=message)


def main() -> None:
    """Train, and print the time of a round."""
    workload, clock, server_app = Workload.from_arguments(), TreeClock(), ServerApp()
    latest: list[ArrayRecord] = []

    def note_round(round_idx: int, arrays: ArrayRecord) -> None:
        if round_idx:  # 0: the initial model
            clock.tick()
            latest[:] = [arrays]

    @server_app.main()
    def run(grid: Grid, context: Context) -> None:
        strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=workload.clients, min_available_nodes=workload.clients)
        strategy.start(
            grid,
            ArrayRecord(workload.network().state_dict()),
            workload.rounds,
            train_config=ConfigRecord({"clients": workload.clients, "images": workload.images, "size": workload.size}),
            evaluate_fn=note_round,
        )

    backend = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}, "init_args": {"num_cpus": 1}}
    run_simulation(server_app, client_app, workload.clients, backend_config=backend)
    clock.report(latest[0].to_torch_state_dict().values())


if __name__ == "__main__":
    # Ray's workers import this module; functions of `__main__` would be copied to them with each message.
    from perf.peers import flower_run

    flower_run.main()
