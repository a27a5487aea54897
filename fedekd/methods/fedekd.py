"""FedeKD (arXiv 2605.05553)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from fedekd.class_paths import build_object
from fedekd.data import split_indices
from fedekd.errors import UserError, require, require_choice
from fedekd.functional import Aggregator, active_exits, all_finite
from fedekd.functional.exit_scheduling import SCHEDULES, Schedule
from fedekd.methods.base import ClientUpdate, ProxyMethod, StateDict
from fedekd.methods.client import Client, has_batch_norm
from fedekd.methods.specification import FederationSpec
from fedekd.modules import ENERGIES, Energy, GatedPrivateModule, HeldOutTrust, ProxyDistillModule
from fedekd.modules.energies import Source
from fedekd.modules.losses import GATES, Gate, require_nonnegative
from fedekd.seeding import derive_seed

OptimizerState = Literal["carry", "reset"]

#: Roles of the proxies. The second one exists with `cross_fit`; its role is the prefix of its tensors in messages.
FIRST, SECOND = "proxy", "second_proxy"


def _message(states: Mapping[str, StateDict]) -> dict[str, Tensor]:
    """Return the tensors of the proxies, by role, as one message."""
    second = {f"{SECOND}.{name}": tensor for name, tensor in states.get(SECOND, {}).items()}
    return {**states[FIRST], **second}


def _states(message: StateDict, roles: Sequence[str]) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of each proxy of a message: the inverse of `_message`."""
    states: dict[str, dict[str, Tensor]] = {role: {} for role in roles}
    for name, tensor in message.items():
        is_second = SECOND in roles and name.startswith(f"{SECOND}.")
        states[SECOND if is_second else FIRST][name.removeprefix(f"{SECOND}.") if is_second else name] = tensor
    return states


class FedeKD(ProxyMethod):
    r"""FedeKD: federated distillation through proxies, gated per sample.

    In each round a client (1) trains its private model on labels and on the gated distillation from the global proxy,

    $$L = L_{sup} + \lambda_{kd} \cdot \frac1n \sum_i w_i\, \mathrm{KL}(q_i \,\|\, p_i),
    \qquad w_i = \frac{1}{1 + \exp(\beta \tilde E_i)} \quad \text{(Eq. 3-5)}$$

    with p the private, q the proxy's prediction and $\tilde E_i$ the energy normalised within the batch, and (2)
    distils the private model into its copy of the proxy, which it sends. The server averages the proxies (Algorithm 1).

    With `gate` `correctness`, $w_i$ is the estimated probability that the global proxy predicts sample i correctly, by
    predicted class and confidence (`fedekd.functional.correctness_trust`; `skill_trust` for regression). It is
    estimated at the beginning of each phase on the client's tuning split, which trains neither network. The mean weight
    is then about the proxy's accuracy on that split, and not 1/2 as with the energy: a poor proxy has less influence.
    A client without tuning samples has weights of 1/2.

    With `cross_fit` two proxies are federated. A client distils the first one on a fixed random half of its training
    samples and the second one on the other half, and each sample is taught by the proxy that was not distilled on it.
    The distilled private model was trained on all samples, so each proxy still depends on the other half through it. A
    client sends and receives twice as much. The agreement of exits with the proxy uses the first one.

    Args:
        beta: Sharpness of the gate, above 0 (Eq. 3).
        lambda_kd: Weight of the gated distillation, at least 0 (Eq. 5); with 0 the private models equal the local
            baseline.
        energy: `kl` (Eq. 1; Eq. 2 for regression), `entropy`, `margin`, `logsumexp` (Eq. 6-8), `feature` (Eq. 9), or
            the class path of a fedekd.modules.Energy.
        gate: `energy` (Eq. 3); `none` has weight 1 for every sample; `reversed` has weight $1 - w_i$, more where the
            models disagree; `correctness` has the estimated probability of a correct proxy. `shuffled`,
            `reversed_shuffled` and `correctness_shuffled` permute these weights within the batch.
        energy_of: Network whose logits `entropy`, `margin` and `logsumexp` use: `proxy` or `private`.
        temperature: Temperature of the distillation into the proxy, above 0.
        proxy_epochs: Epochs of the distillation into the proxy, at least 1; null is client.local_epochs.
        private_optimizer_state: `carry` the optimizer state of the private model from round to round, or `reset` it.
        proxy_optimizer_state: `reset` by default, because aggregation replaces the proxy's weights.
        aggregator: Another aggregator of the proxies, by class_path; null is the uniform mean (Algorithm 1, line 7).
        schedule: For a private model with exits: `all_on`, or `progressive`, which trains the deepest exit from the
            first round on and adds the others, shallow ones first, over the first half of the rounds.
        consistency_weight: For a private model with exits: weight of the distillation from its deepest exit to the
            others, at least 0.
        cross_fit: Federate two proxies, and teach each sample by the one that was not distilled on it. With `lambda_kd`
            0 both are federated, but not used as teachers. Not with augmented training samples, whose teacher outputs
            are not computed in advance.

    Raises:
        UserError: If a value is out of range.

    Reference:
        FedeKD, arXiv 2605.05553, Algorithm 1.
    """

    def __init__(
        self,
        beta: float = 1.0,
        lambda_kd: float = 1.0,
        energy: str | Energy = "kl",
        gate: Gate = "energy",
        energy_of: Source = "proxy",
        temperature: float = 1.0,
        proxy_epochs: int | None = None,
        private_optimizer_state: OptimizerState = "carry",
        proxy_optimizer_state: OptimizerState = "reset",
        aggregator: Aggregator | None = None,
        schedule: Schedule = "all_on",
        consistency_weight: float = 0.0,
        cross_fit: bool = False,
    ) -> None:
        super().__init__(aggregator)
        require_choice("method.schedule", schedule, SCHEDULES)
        require_nonnegative("method.consistency_weight", consistency_weight)
        require(0 < beta < math.inf, "method.beta", "a finite number above 0", beta)
        require_nonnegative("method.lambda_kd", lambda_kd)
        require(0 < temperature < math.inf, "method.temperature", "a finite number above 0", temperature)
        require(proxy_epochs is None or proxy_epochs >= 1, "method.proxy_epochs", "at least 1, or null", proxy_epochs)
        require_choice("method.private_optimizer_state", private_optimizer_state, get_args(OptimizerState))
        require_choice("method.proxy_optimizer_state", proxy_optimizer_state, get_args(OptimizerState))
        if isinstance(energy, str) and energy not in ENERGIES:
            class_path = energy
            if "." not in class_path:
                require_choice("method.energy", class_path, ENERGIES)
            energy = build_object("method.energy", class_path)
            require(isinstance(energy, Energy), "method.energy", "a subclass of fedekd.modules.Energy", class_path)
        require_choice("method.energy_of", energy_of, get_args(Source))
        self.beta, self.lambda_kd, self.energy = beta, lambda_kd, energy
        require_choice("method.gate", gate, GATES)
        self.gate, self.energy_of, self.cross_fit = gate, energy_of, cross_fit
        if GATES[gate].needs_trust:
            self.training_splits = ("train", "tuning")
        self.temperature, self.proxy_epochs = temperature, proxy_epochs
        self.schedule, self.consistency_weight = schedule, consistency_weight
        self.carry_private = private_optimizer_state == "carry"
        self.carry_proxy = proxy_optimizer_state == "carry"

    def init_server(self, spec: FederationSpec) -> None:
        """Build the initial proxies, and check the options on each architecture.

        Raises:
            UserError: If an option does not fit the task, the networks or the data.
        """
        require(
            not (self.cross_fit and spec.transform),
            "method.cross_fit",
            "false with augmented training samples (data.transform)",
            self.cross_fit,
        )
        super().init_server(spec)
        if self.cross_fit:
            self.server_state = _message({role: self.server_state for role in (FIRST, SECOND)})
        proxy = spec.build_model("proxy", "server")
        for number in {spec.architecture_key(number): number for number in range(spec.num_clients)}.values():
            private = spec.build_model("private", number)
            no_trust = HeldOutTrust(spec.task, torch.empty(0, spec.num_outputs), torch.empty(0, dtype=torch.int64))
            try:
                self._private_module(spec, private, proxy, self.lambda_kd, trust=no_trust)
            except UserError as error:
                raise UserError(f"method.{error}") from error
            self._proxy_module(spec, private, proxy)

    def init_client(self, client: Client) -> None:
        """Add the proxies to the client's networks."""
        for role in self._roles:
            client.networks[role] = client.spec.build_model("proxy", "server")

    @property
    def _roles(self) -> tuple[str, ...]:
        """Roles of the proxies."""
        return (FIRST, SECOND) if self.cross_fit else (FIRST,)

    def receive(self, client: Client, received: StateDict, round_idx: int) -> dict[str, float]:
        """Load the proxies, and train the private model with them (lines 9-17)."""
        states = _states(received, self._roles)
        for role, state in states.items():
            client.networks[role].load_state_dict(state)
        if round_idx == 0:
            return {}
        private, proxy = client.networks["private"], client.networks[FIRST]
        lambda_kd, active = self.lambda_kd, self._active_exits(client, round_idx)
        if lambda_kd and any(self.is_untrained(client, state) for state in states.values()):
            lambda_kd = 0.0  # without a teacher the phase is that of the local baseline
        trust = self._held_out_trust(client) if lambda_kd and GATES[self.gate].needs_trust else None
        module = self._private_module(client.spec, private, proxy, lambda_kd, active, trust)
        teacher_outputs: tuple[Tensor, ...] = ()
        if lambda_kd:
            # The proxy is frozen during the phase: one forward pass per sample, not one per epoch.
            teacher_outputs = self._teacher_outputs(client, module.with_features)
            if not all_finite(teacher_outputs):
                # A broken teacher counts as none.
                module, teacher_outputs = self._private_module(client.spec, private, proxy, 0.0, active), ()
        return client.train_supervised(module, teacher_outputs=teacher_outputs, carry_optimizer=self.carry_private)

    def _held_out_trust(self, client: Client) -> HeldOutTrust:
        """Estimate the trust in the global proxies on the tuning split."""
        outputs = [client.predict(role, "tuning").output for role in self._roles]
        targets, splits = client.training_targets, client.splits
        tuning, train = (targets[indices.to(targets.device)] for indices in (splits.tuning, splits.train))
        trust = HeldOutTrust(
            client.spec.task,
            torch.cat(outputs),  # one trust for both proxies, which are equal in distribution
            tuning.repeat(len(outputs)),
            mean=float(train.double().mean()),
        )
        return trust.to(client.spec.trainer.torch_device)

    def _teacher_outputs(self, client: Client, with_features: bool) -> tuple[Tensor, ...]:
        """Return the outputs of the teacher of each training sample."""
        first, *second = (client.teacher_outputs(role, with_features) for role in self._roles)
        if not second:
            return first
        half = self._halves(client)[FIRST].to(client.samples.inputs.device)
        return tuple(
            own.index_copy(0, half, other.index_select(0, half)) for own, other in zip(first, second[0], strict=True)
        )

    @staticmethod
    def _halves(client: Client) -> dict[str, Tensor]:
        """Return the positions in the training split on which each proxy is distilled.

        A group of samples, such as a patient, is in one half. A single sample or group leaves the second half empty.
        """
        size, groups = len(client.splits.train), client.samples.group
        of_sample = None if groups is None else groups[client.splits.train.to(groups.device)].cpu().numpy()
        if (size if of_sample is None else len(set(of_sample.tolist()))) < 2:
            return {FIRST: torch.arange(size), SECOND: torch.arange(0)}
        seed = derive_seed(client.spec.seed, client.number, "cross-fit")
        first, _, second = split_indices(range(size), (0.5, 0.0, 0.5), seed, of_sample)
        return {FIRST: torch.from_numpy(first), SECOND: torch.from_numpy(second)}

    def _active_exits(self, client: Client, round_idx: int) -> list[bool] | None:
        """Return which exits are trained in a round; None is all of them.

        Updates of heads cannot be compared across architectures, so only the budget of the schedule is used.
        """
        exits = getattr(client.networks["private"], "num_exits", 1)
        if self.schedule == "all_on" or exits == 1:
            return None
        rounds = client.spec.rounds
        active: list[bool] = active_exits(torch.eye(1), round_idx, rounds, exits, schedule=self.schedule)[0].tolist()
        return active

    def scheduled_epochs(self, spec: FederationSpec) -> int:
        """Return the most epochs of private model and proxy."""
        return spec.rounds * max(spec.client.local_epochs, self.proxy_epochs or 0)

    def prepare_update(self, client: Client, round_idx: int) -> ClientUpdate:
        """Distil the private model into the proxies (lines 2-5), and return them."""
        halves: dict[str, Tensor] | None = self._halves(client) if self.cross_fit else None
        outputs = client.teacher_outputs("private")
        for role in self._roles:
            proxy, positions = client.networks[role], None if halves is None else halves[role]
            if positions is not None and len(positions) < (2 if has_batch_norm(proxy) else 1):
                continue  # too few samples for a step: the received proxy goes back
            client.train(
                role,
                self._proxy_module(client.spec, client.networks["private"], proxy),
                round_idx,
                epochs=self.proxy_epochs,
                teacher_outputs=outputs if positions is None else tuple(output[positions] for output in outputs),
                positions=positions,
                carry_optimizer=self.carry_proxy,
            )
        return ClientUpdate.of(client, _message({role: client.networks[role].state_dict() for role in self._roles}))

    def _private_module(
        self,
        spec: FederationSpec,
        private: nn.Module,
        proxy: nn.Module,
        lambda_kd: float,
        active: list[bool] | None = None,
        trust: HeldOutTrust | None = None,
    ) -> GatedPrivateModule:
        return GatedPrivateModule(
            private,
            proxy,
            spec.task,
            energy=self.energy,
            beta=self.beta,
            lambda_kd=lambda_kd,
            optimizer=spec.optimizer,
            gate=self.gate,
            energy_of=self.energy_of,
            active=active,
            consistency_weight=self.consistency_weight,
            trust=trust,
        )

    def _proxy_module(self, spec: FederationSpec, private: nn.Module, proxy: nn.Module) -> ProxyDistillModule:
        return ProxyDistillModule(proxy, private, spec.task, self.temperature, spec.optimizer)
