"""Local training: what every client could do on its own."""

from __future__ import annotations

from fedekd.methods.base import Method, StateDict
from fedekd.methods.client import Client
from fedekd.modules import SupervisedModule


class Local(Method):
    """Each client trains its private model on its own data. Nothing travels.

    It is the reference of Delta, and so it is paired with every method: the same initial weights, the same batch
    order and the same number of supervised epochs per round.
    """

    is_local_baseline = True

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Train for `local_epochs` on L_sup."""
        if round_idx == 0:
            return {}
        module = SupervisedModule(client.networks["private"], client.spec.task, client.spec.optimizer)
        logs = client.train("private", module, client.supervised_rounds + 1, carry_optimizer=True)
        client.supervised_epochs += client.spec.client.local_epochs
        return logs
