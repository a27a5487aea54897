"""What methods have in common in which a small proxy travels and the private model stays."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from fedekd.functional import Aggregator, Mean
from fedekd.methods.base import Broadcast, Method, StateDict, Update, is_uniform_mean
from fedekd.methods.client import Client
from fedekd.methods.specification import FederationSpec


class ProxyMethod(Method):
    """Every client carries a proxy beside its private model; the server merges the proxies and sends them back.

    Args:
        aggregator: How proxies are merged; None takes the uniform mean.
    """

    def __init__(self, aggregator: Aggregator | None = None) -> None:
        super().__init__()
        self.merge = aggregator if aggregator is not None else Mean()

    @property
    def supports_secure_mean(self) -> bool:
        """Whether proxies are merged by the uniform mean, and nothing else is done with them."""
        return type(self).aggregate is ProxyMethod.aggregate and is_uniform_mean(self.merge)

    def init_server(self, spec: FederationSpec) -> None:
        """One initial proxy for all."""
        self.server_state = dict(spec.build_model("proxy", "server").state_dict())

    def init_client(self, client: Client) -> None:
        """A client carries a proxy beside its private model."""
        client.networks["proxy"] = client.spec.build_model("proxy", "server")

    def broadcast(self, participants: Sequence[int], round_idx: int) -> Broadcast:
        """The global proxy."""
        return Broadcast(self.server_state)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the global proxy."""
        client.networks["proxy"].load_state_dict(received)
        return {}

    @abstractmethod
    def prepare_update(self, client: Client, round_idx: int) -> Update:
        """Train the proxy, and send it (`proxy_of`)."""

    def proxy_of(self, client: Client) -> Update:
        """A client's proxy, as it is sent."""
        return Update(client.number, dict(client.networks["proxy"].state_dict()), len(client.splits.train))

    def aggregate(self, updates: Sequence[Update], round_idx: int) -> None:
        """The merged proxies."""
        self.server_state = self.merge([u.state for u in updates], [u.num_samples for u in updates])
