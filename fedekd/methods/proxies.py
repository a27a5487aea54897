"""What methods have in common in which a small proxy travels and the private model stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import Broadcast, Method, StateDict, Update, is_uniform_mean
from fedekd.methods.blueprint import Blueprint
from fedekd.methods.client import Client


class ProxyMethod(Method):
    """Every client carries a proxy beside its private model; the server merges the proxies and sends them back.

    Args:
        aggregator: How proxies are merged; None takes the uniform mean.
    """

    def __init__(self, aggregator: Aggregator | None = None) -> None:
        super().__init__()
        self.merge = aggregator if aggregator is not None else Mean()

    @property
    def needs_only_mean(self) -> bool:
        """Whether proxies are merged by the uniform mean, and nothing else is done with them."""
        return type(self).aggregate is ProxyMethod.aggregate and is_uniform_mean(self.merge)

    def start(self, blueprint: Blueprint) -> None:
        """One initial proxy for all."""
        self.server_state = dict(blueprint.network("proxy", "server").state_dict())

    def equip(self, client: Client) -> None:
        """A client carries a proxy beside its private model."""
        client.networks["proxy"] = client.blueprint.network("proxy", "server")

    def broadcast(self, participants: Sequence[int], round: int) -> Broadcast:
        """The global proxy."""
        return Broadcast(self.server_state)

    def absorb(self, client: Client, received: StateDict, round: int) -> dict[str, float]:
        """Load the global proxy."""
        client.networks["proxy"].load_state_dict(received)
        return {}

    @abstractmethod
    def upload(self, client: Client, round: int) -> Update:
        """Train the proxy, and send it (`proxy_of`)."""

    def proxy_of(self, client: Client) -> Update:
        """A client's proxy, as it is sent."""
        return Update(client.number, dict(client.networks["proxy"].state_dict()), len(client.splits.train))

    def aggregate(self, updates: Sequence[Update], round: int) -> None:
        """The merged proxies."""
        self.server_state = self.merge([u.state for u in updates], [u.num_samples for u in updates])
