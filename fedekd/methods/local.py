"""Local training: the baseline of Delta."""

from __future__ import annotations

from fedekd.methods.base import Method, StateDict
from fedekd.methods.client import Client
from fedekd.modules import SupervisedModule


class Local(Method):
    """Local training: clients train on their own data and exchange nothing.

    This is the baseline of Delta. It is paired with every method: the same training samples, the same number of
    supervised epochs without those of fine-tuning, and the initial weights of a client that receives no model. Methods
    whose `train_supervised` has no `round_idx` also have the same order of batches.
    """

    is_local_baseline = True

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Train the private model for `local_epochs` on L_sup."""
        if round_idx == 0:
            return {}
        module = SupervisedModule(client.networks["private"], client.spec.task, client.spec.optimizer)
        return client.train_supervised(module, carry_optimizer=True)
