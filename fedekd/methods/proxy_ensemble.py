"""Prior-aware proxies, served as an ensemble with the private model."""

from __future__ import annotations

import math
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedekd.errors import require, require_choice
from fedekd.functional import Aggregator, Mean, all_finite, fit_linear_weights, fit_log_linear_weights
from fedekd.functional.label_prior import SERVING_SMOOTHING, TRAINING_SMOOTHING
from fedekd.global_state import isolated_rng
from fedekd.methods.base import Candidates, ClientUpdate, ProxyMethod, StateDict
from fedekd.methods.client import Client
from fedekd.methods.fedper import is_in_module
from fedekd.methods.serving import Serving
from fedekd.methods.specification import FederationSpec
from fedekd.modules import GatedPrivateModule, SupervisedModule
from fedekd.seeding import derive_seed

Served = Literal["ensemble", "private"]
Combination = Literal["fitted", "equal"]

#: Members of the ensemble: f, q and u below.
MEMBERS = ("private", "proxy", "tuned")

#: Norm of the rows of the proxies' common head.
_HEAD_NORM = 2.0

#: Fewest tuning samples on which weights are fitted.
_MIN_TUNING = 10


class ProxyEnsemble(ProxyMethod):
    r"""ProxyEnsemble: an ensemble of private model and prior-aware proxies.

    The proxy $g(x) = W \varphi(x)$ has a frozen head W, equal at all clients; only $\varphi$ is exchanged. The rows of
    W are orthogonal with norm 2 if $\varphi$ has at least as many features as there are classes.

    1. Client: $\min_\varphi \mathrm{CE}(\mathrm{softmax}(g(x) + \log\pi_k), y)$, with the label prior $\pi_k(c) =
       (n_{kc} + 0.01) / (n_k + 0.01\,C)$ of its training samples.
    2. Server: $\varphi = \sum_k n_k \varphi_k / \sum_k n_k$.
    3. Client k serves $p \propto f_k^{w_1} q_k^{w_2} u_k^{w_3}$: the private model $f_k$, trained as in local
       training; the global proxy with the client's prior, $q_k = \mathrm{softmax}(g(x) + \log\pi_k)$; and, after the
       last round, the tuned proxy $u_k$, trained for `finetune_epochs` more on the client's samples. At serving time
       each class counts one sample more in $\pi_k$.

    For regression the client's mean target takes the place of $\log\pi_k$, the head is trained and exchanged, and the
    outputs are averaged.

    A client sends the weights of $\varphi$ (for regression of the whole proxy) and its number of training samples
    $n_k$. The number of samples per class is not part of the update; a Flower site's description has it, see
    docs/how-to/flower.md.

    Args:
        proxy_epochs: Epochs of the proxy per round, at least 1.
        finetune_epochs: Epochs of the tuned proxy after the last round, at least 0; with 0 it equals the proxy and is
            not served.
        members: Networks that are combined: `private`, `proxy` and `tuned`; null is all of them, and for regression
            `private` and `tuned`: the mean target corrects the global proxy for some clients only.
        combination: `fitted` fits the weights on the tuning split, shrunk towards equal weights, which are used for
            fewer than 10 samples; `equal` has equal weights; null is `fitted`, and for regression `equal`.
        ridge: Strength of this shrinkage, above 0; larger values give weights closer to equal weights.
        label_prior: Train and serve the proxies with the client's label prior.
        frozen_head: Freeze the common head of the proxies; false trains and exchanges it.
        weights: `samples` weights clients by their training samples; `uniform` gives each the same weight, as secure
            aggregation requires.
        aggregator: Another aggregator of the proxies, by class_path; null is the mean with `weights`.
        serve: `ensemble`, or `private` for clients that can serve one network only: the ensemble is distilled into a
            copy of the private model after the last round. The rounds before it are scored with the ensemble.
        lambda_kd: Weight of that distillation relative to the supervised loss, at least 0.
        distillation_epochs: Epochs of that distillation, at least 1.

    Raises:
        UserError: If a value is out of range.

    Reference:
        The balanced predictor is that of FedRoD (Chen and Chao, ICLR 2022, arXiv 2107.00778), here of the proxy.
    """

    serves_more = True

    def __init__(
        self,
        proxy_epochs: int = 4,
        finetune_epochs: int = 4,
        members: list[str] | str | None = None,
        combination: Combination | None = None,
        ridge: float = 10.0,
        label_prior: bool = True,
        frozen_head: bool = True,
        weights: Literal["uniform", "samples"] = "samples",
        aggregator: Aggregator | None = None,
        serve: Served = "ensemble",
        lambda_kd: float = 1.0,
        distillation_epochs: int = 4,
    ) -> None:
        super().__init__(aggregator if aggregator is not None else Mean(weights))
        require(proxy_epochs >= 1, "method.proxy_epochs", "at least 1", proxy_epochs)
        require(finetune_epochs >= 0, "method.finetune_epochs", "at least 0", finetune_epochs)
        members = [members] if isinstance(members, str) else members
        require(members is None or len(members) > 0, "method.members", "at least one network, or null", members)
        for name in members or ():
            require_choice("method.members", name, MEMBERS)
        if combination is not None:
            require_choice("method.combination", combination, get_args(Combination))
        require(0 < ridge < math.inf, "method.ridge", "a finite number above 0", ridge)
        require_choice("method.serve", serve, get_args(Served))
        require(0 <= lambda_kd < math.inf, "method.lambda_kd", "a finite number of at least 0", lambda_kd)
        require(
            finetune_epochs > 0 or members is None or "tuned" not in members,
            "method.members",
            "no member 'tuned' with method.finetune_epochs 0",
            members,
        )
        require(distillation_epochs >= 1, "method.distillation_epochs", "at least 1", distillation_epochs)
        self.proxy_epochs, self.finetune_epochs = proxy_epochs, finetune_epochs
        self.members = members
        self.ridge = ridge
        if combination != "equal":
            self.training_splits = ("train", "tuning")
        self.combination, self.label_prior, self.frozen_head = combination, label_prior, frozen_head
        self.serve, self.lambda_kd, self.distillation_epochs = serve, lambda_kd, distillation_epochs

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial global features.

        Raises:
            UserError: If the proxy has no linear head, no proxy is served, a network with exits is not a member, or one
                network is served and the round is selected: earlier rounds serve the ensemble.
        """
        is_selected = self.serve == "private" and spec.select_round == "best"
        require(not is_selected, "select_round", "last with method.serve private", spec.select_round)
        members = self._members(spec)
        require(
            members != ["private"] or self.members is not None,
            "method.finetune_epochs",
            "at least 1 for regression with the default members",
            self.finetune_epochs,
        )
        has_exits = any(spec.client.exits_for(number) is not None for number in range(spec.num_clients))
        require(
            not has_exits or "private" in members, "method.members", "'private' with client.exits", ", ".join(members)
        )
        self.server_state = self._travelling(self._build_proxy(spec))

    def init_client(self, client: Client) -> None:
        """Add the proxy, the tuned proxy and, if it is served, the student."""
        client.networks["proxy"] = self._build_proxy(client.spec)
        client.networks["tuned"] = self._build_proxy(client.spec)
        if self.serve == "private":
            client.networks["student"] = client.spec.build_model("private", client.number)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the proxy, train the private model as in local training, and combine."""
        proxy = client.networks["proxy"]
        proxy.load_state_dict({**proxy.state_dict(), **received})
        if round_idx == 0:
            return {}
        spec, is_last = client.spec, round_idx == client.spec.rounds
        module = SupervisedModule(client.networks["private"], spec.task, spec.optimizer)
        logs = client.train_supervised(module, carry_optimizer=True)
        if is_last and self.finetune_epochs:
            client.networks["tuned"].load_state_dict(proxy.state_dict())
            self._train_proxy(client, "tuned", round_idx, self.finetune_epochs)
        client.serving = self._combine(client, received, has_tuned=is_last and self.finetune_epochs > 0)
        if is_last and self.serve == "private" and client.serving is not None:
            self._distil(client, round_idx)
            return logs  # one network is served: no weights
        serving, weights = client.serving, {}
        if serving is not None:
            weights = dict(zip(serving.members, serving.weights.tolist(), strict=True))
        return logs | {f"serving/weight_{name}": weights.get(name, 0.0) for name in self._members(spec)}

    last_round_candidates = ("tuned", "student")

    def candidates(self) -> Candidates:
        """Return the networks with the client's prior, and what is served."""
        tuned: Candidates = {"tuned": partial(self._corrected, role="tuned")} if self.finetune_epochs else {}
        return {
            "private": lambda client: None,
            "proxy": partial(self._corrected, role="proxy"),
            **tuned,
            "ensemble" if self.serve == "ensemble" else "student": lambda client: client.serving,
        }

    def _corrected(self, client: Client, role: str) -> Serving:
        """Return a proxy with the client's prior."""
        return client.single(role, self._offset(client, SERVING_SMOOTHING))

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Return the most epochs of private model, proxy, tuned proxy and student."""
        distillation = self.distillation_epochs if self.serve == "private" else 0
        proxies = max(spec.rounds * self.proxy_epochs, self.finetune_epochs, distillation)
        return max(super().scheduled_epochs(spec), proxies)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Train the proxy on labels, and return its exchanged tensors."""
        self._train_proxy(client, "proxy", round_idx, self.proxy_epochs)
        return ClientUpdate.of(client, self._travelling(client.networks["proxy"]))

    def _members(self, spec: FederationSpec) -> list[str]:
        """Return the members in order, the private model first."""
        default = ("private", "tuned") if spec.task == "regression" else MEMBERS
        names = [name for name in MEMBERS if name in (self.members or default)]
        return [name for name in names if name != "tuned" or self.finetune_epochs]

    def _build_proxy(self, spec: FederationSpec) -> nn.Module:
        """Build the initial proxy, with the common head of all clients."""
        proxy = spec.build_model("proxy", "server")
        if spec.task == "regression" or not self.frozen_head:
            return proxy
        head = getattr(proxy, "head", None)
        require(
            isinstance(head, nn.Linear),
            "client.proxy_model",
            "a network whose last layer is the nn.Linear 'head', for method ProxyEnsemble",
            spec.client.proxy_model["class_path"],
            "Choose another model, or set --method.frozen_head false.",
        )
        assert isinstance(head, nn.Linear)
        with torch.no_grad(), isolated_rng(derive_seed(spec.seed, "server", "proxy head"), spec.trainer.torch_device):
            weight = torch.empty(head.weight.shape, dtype=torch.float64)
            head.weight.copy_(nn.init.orthogonal_(weight, gain=_HEAD_NORM))
            if head.bias is not None:
                head.bias.zero_()
        head.requires_grad_(False)
        return proxy

    def _travelling(self, proxy: nn.Module) -> dict[str, Tensor]:
        """Return the tensors that are exchanged: all but those of a frozen head."""
        frozen = [name for name, parameter in proxy.named_parameters() if not parameter.requires_grad]
        is_frozen = any(is_in_module(name, "head") for name in frozen)
        state = proxy.state_dict()
        return {name: tensor for name, tensor in state.items() if not (is_frozen and is_in_module(name, "head"))}

    def _train_proxy(self, client: Client, role: str, round_idx: int, epochs: int) -> None:
        """Train a proxy on labels with the client's prior; the optimizer starts new."""
        spec = client.spec
        offset = self._offset(client, TRAINING_SMOOTHING)
        module = SupervisedModule(client.networks[role], spec.task, spec.optimizer, offset)
        client.train(role, module, round_idx, epochs=epochs)

    def _offset(self, client: Client, smoothing: float) -> Tensor | None:
        """Return log pi_k, or the mean target in regression, shape (C,)."""
        if not self.label_prior:
            return None
        if client.spec.task != "regression":
            return client.log_label_prior(smoothing)
        targets = client.training_targets[client.splits.train.to(client.samples.targets.device)]
        return targets.double().mean().reshape(1).to(client.spec.trainer.dtype)

    def _combine(self, client: Client, received: StateDict, has_tuned: bool) -> Serving | None:
        """Choose members and weights; None serves the private model."""
        names = [name for name in self._members(client.spec) if name != "tuned" or has_tuned]
        if "proxy" in names and self.is_untrained(client, received):
            names.remove("proxy")
        shift, task = self._offset(client, SERVING_SMOOTHING), client.spec.task
        none = torch.zeros(client.spec.num_outputs, dtype=client.spec.trainer.dtype)
        offsets = {name: none if name == "private" or shift is None else shift.cpu() for name in names}
        outputs = {name: client.predict(name, "tuning").output.cpu().double() + offsets[name] for name in names}
        # A member that diverged would make every prediction NaN, and the tuning split may be empty.
        names = [name for name in names if all_finite([outputs[name], *client.networks[name].state_dict().values()])]
        if not names or names == ["private"]:
            return None
        member_outputs, targets = torch.stack([outputs[name] for name in names]), self._tuning_targets(client)
        combination = self.combination or ("equal" if task == "regression" else "fitted")
        if combination == "equal":
            weights = torch.full((len(names),), 1 / len(names), dtype=torch.float64)
        elif task == "regression":
            weights = fit_linear_weights(member_outputs[..., 0], targets.double(), self.ridge, _MIN_TUNING)
        else:
            log_probabilities = member_outputs.log_softmax(dim=2)
            weights = fit_log_linear_weights(log_probabilities, targets, self.ridge, _MIN_TUNING)
        return Serving(tuple(names), weights.to(none), torch.stack([offsets[name] for name in names]))

    @staticmethod
    def _tuning_targets(client: Client) -> Tensor:
        """Return the targets of the tuning split in the unit of the outputs."""
        return client.training_targets[client.splits.tuning.to(client.samples.targets.device)].cpu()

    def _distil(self, client: Client, round_idx: int) -> None:
        """Distil the ensemble into a copy of the private model, which is then served."""
        spec, student, teacher = client.spec, client.networks["student"], client.network(client.served_role)
        student.load_state_dict(client.networks["private"].state_dict())
        module = GatedPrivateModule(
            student, teacher, spec.task, lambda_kd=self.lambda_kd, optimizer=spec.optimizer, gate="none"
        )
        outputs = client.teacher_outputs(client.served_role) if self.lambda_kd else ()
        client.train("student", module, round_idx, epochs=self.distillation_epochs, teacher_outputs=outputs)
        dtype = spec.trainer.dtype
        client.serving = Serving(
            ("student",), torch.ones(1, dtype=dtype), torch.zeros(1, spec.num_outputs, dtype=dtype)
        )
