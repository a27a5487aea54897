"""FedAvg as a bare PyTorch loop.

Run as `python -m perf.peers.bare_loop CLIENTS IMAGES SIZE ROUNDS`.
"""

from __future__ import annotations

import torch

from perf.peers.workload import Clock, Workload, train


def main() -> None:
    """Train, and print the time of a round."""
    workload, clock = Workload.from_arguments(), Clock()
    network, (images, labels) = workload.network(), workload.scaled()
    for _ in range(workload.rounds):
        initial = {name: value.clone() for name, value in network.state_dict().items()}
        mean = {name: torch.zeros_like(value) for name, value in initial.items()}
        for x, y in zip(images, labels, strict=True):
            network.load_state_dict(initial)
            train(network, x, y)
            for name, value in network.state_dict().items():
                mean[name] += value / workload.clients
        network.load_state_dict(mean)
        clock.tick()
    clock.report(network.parameters())


if __name__ == "__main__":
    main()
