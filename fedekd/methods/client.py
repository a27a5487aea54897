"""A client: its data, its networks, and all that must last from one round to the next."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fedekd.data import ClientSplits, ImageData, TensorBatches, scale
from fedekd.methods.specification import FederationSpec
from fedekd.metrics import score
from fedekd.models.modes import eval_mode
from fedekd.modules import ModelOutput, ObjectiveModule, predict
from fedekd.seeding import derive_seed


@contextmanager
def isolated_rng(device: torch.device) -> Iterator[None]:
    """Whatever is drawn from the global generators inside, afterwards they are as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


class Client:
    """One client of a federation, wherever it runs.

    All that must last is in `state_dict`: networks, optimizer states, what the method keeps, and how many
    supervised epochs the private model has had. The data is given from outside and never part of it.

    Args:
        number: The client's number, from 0.
        splits: Which samples are its own.
        images: The data set, shared by all clients of a process, on the training device.
        spec: How networks are built and trained.

    Attributes:
        networks: By role: `private`, and what else the method equips the client with.
        optimizer_states: By role: the states of optimizers that are carried from round to round.
        loss_scales: By role: the states of float16's loss scalers; empty in other precisions.
        method_state: What the method keeps on the client, as a plain state_dict.
        supervised_epochs: Epochs of supervised training that the private model has had.
        training_splits: The splits that the method's training looks at.
    """

    training_splits: tuple[str, ...] = ("train",)

    def __init__(self, number: int, splits: ClientSplits, images: ImageData, spec: FederationSpec) -> None:
        self.number, self.splits, self.images, self.spec = number, splits, images, spec
        self.networks: dict[str, nn.Module] = {"private": spec.build_model("private", number)}
        self.optimizer_states: dict[str, dict[str, Any]] = {}
        self.loss_scales: dict[str, dict[str, Any]] = {}
        self.method_state: dict[str, Any] = {}
        self.supervised_epochs = 0

    @property
    def supervised_rounds(self) -> int:
        """Rounds of supervised training that the private model has had; it is held against Local after as many."""
        return self.supervised_epochs // self.spec.client.local_epochs

    def train(
        self,
        role: str,
        module: ObjectiveModule,
        round_idx: int,
        *,
        epochs: int | None = None,
        first_epoch: int = 0,
        teacher_outputs: tuple[Tensor, ...] = (),
        carry_optimizer: bool = False,
    ) -> dict[str, float]:
        """Train a network of this client on its training split: one phase of a round.

        The order of the batches and every other random choice of an epoch depend on (seed, client, round, role,
        epoch) alone: a phase may be trained in one go, or epoch by epoch in turn with another.

        Args:
            role: Which network; names the phase and the optimizer state.
            module: The LightningModule that trains it.
            round_idx: The round, for the seed.
            epochs: How many; the client's `local_epochs` by default.
            first_epoch: Number of the first of them within the phase, for the seed.
            teacher_outputs: The frozen teacher's tensors for the training split, in order (`ModelOutput.tensors`).
            carry_optimizer: Go on from the optimizer state of the last phase of this role, and keep the new one.

        Returns:
            What the module recorded in the last epoch, such as `loss` and `gate/weight_mean`.
        """
        spec, trainer = self.spec, self.spec.trainer
        epochs = spec.client.local_epochs if epochs is None else epochs

        def begin_epoch(epoch: int) -> torch.Generator:
            seed = derive_seed(spec.seed, self.number, round_idx, role, first_epoch + epoch)
            torch.manual_seed(seed)  # what layers such as dropout draw from
            return torch.Generator().manual_seed(seed)

        batches = TensorBatches(
            self.images.pixels,
            self.images.targets,
            self.splits.train,
            spec.batch_size,
            generator=begin_epoch,
            extras=teacher_outputs,
            min_batch=2 if has_batch_norm(module.network) else 1,
            channels_last=trainer.channels_last,
        )
        if carry_optimizer:
            module.carries_optimizer_state = True
            module.optimizer_state = self.optimizer_states.get(role)
        module.loss_scale = self.loss_scales.get(role, {})
        module.lr_factor = spec.client.lr_decay**self.supervised_rounds
        with isolated_rng(trainer.torch_device):
            trainer.fit(module, batches, epochs)
        if carry_optimizer:
            assert module.optimizer_state is not None
            self.optimizer_states[role] = module.optimizer_state
        if module.loss_scale:
            self.loss_scales[role] = module.loss_scale
        return module.epoch_means

    @torch.no_grad()  # not inference mode: a student's backward pass may save these tensors
    def predict(self, role: str, split: str, with_features: bool = False, *, mixed: bool = True) -> ModelOutput:
        """A network's predictions for all samples of a split, in order, in evaluation mode.

        Args:
            role: Which network.
            split: `train`, `validation`, `tuning`, `calibration`, `holdout` or `test`.
            with_features: Also the features.
            mixed: In the mixed precision of training, where that is one; False is in the precision of the weights.
        """
        network, trainer = self.networks[role], self.spec.trainer
        indices = getattr(self.splits, split).to(self.images.pixels.device)
        parts = []
        with eval_mode(network), trainer.autocast() if mixed else nullcontext():
            for chosen in indices.split(self.spec.eval_batch_size):
                x = scale(self.images.pixels[chosen]).to(trainer.dtype).contiguous(memory_format=trainer.memory_format)
                parts.append(predict(network, x, with_features))
        if not parts:
            empty = torch.empty(0, self.spec.num_outputs, device=self.images.pixels.device)
            return ModelOutput((empty,) * getattr(network, "num_exits", 1))
        exits = tuple(torch.cat(outputs) for outputs in zip(*(part.exits for part in parts), strict=True))
        features = torch.cat([part.features for part in parts if part.features is not None]) if with_features else None
        return ModelOutput(exits, features)

    def score(self, split: str = "test", role: str = "private") -> float:
        """Accuracy or RMSE of one of the client's networks, at its last exit, on one of its own splits."""
        return self.exit_scores(split, role)[-1]

    def exit_scores(self, split: str = "test", role: str = "private") -> list[float]:
        """The same at each exit; a plain network has one."""
        targets = self.images.targets[getattr(self.splits, split).to(self.images.targets.device)]
        return [score(output, targets, self.spec.task) for output in self.predict(role, split).exits]

    def losses(self, split: str, role: str = "private") -> Tensor:
        """What a network's last exit loses on each sample of a split: 1 if it is wrong, or its squared error; (n,).

        An output that is not finite is wrong, or as far off as can be. No mixed precision: what is compared by these is
        the model as `predict` will use it.
        """
        output = self.predict(role, split, mixed=False).output
        targets = self.images.targets[getattr(self.splits, split).to(self.images.targets.device)]
        finite = output.isfinite().all(dim=1)
        if self.spec.task == "regression":
            return torch.where(finite, (output.double().squeeze(1) - targets.double()).square(), torch.inf)
        return ((output.argmax(dim=1) != targets) | ~finite).double()

    @property
    def deployed_role(self) -> str:
        """Which network the client uses after the last round: `private`, or `local` where that was kept."""
        return "local" if "local" in self.networks else "private"

    @property
    def deployed_model(self) -> nn.Module:
        """The network that the client uses after the last round."""
        return self.networks[self.deployed_role]

    def use_local_model(self, local: Client | None) -> None:
        """Use the model that Local has trained, or again the federated one, which stays beside it.

        Args:
            local: The client as Local left it; None for the federated model.
        """
        self.networks.pop("local", None)
        if local is not None:
            self.networks["local"] = local.networks["private"]

    def load_received(self, received: Mapping[str, Tensor]) -> None:
        """Load what was received into the private model; the rest of it is the client's own.

        What is its own and no longer finite, after training that diverged, gets its initial values again: nobody else
        would ever mend it.
        """
        network = self.networks["private"]
        own = {name: tensor for name, tensor in network.state_dict().items() if name not in received}
        if not all(bool(tensor.isfinite().all()) for tensor in own.values()):
            initial = self.spec.build_model("private", self.number).state_dict()
            own = {name: tensor if bool(tensor.isfinite().all()) else initial[name] for name, tensor in own.items()}
        network.load_state_dict({**own, **received})

    def state_dict(self) -> dict[str, Any]:
        """All that must last, as plain tensors and numbers."""
        return {
            "networks": {role: network.state_dict() for role, network in self.networks.items()},
            "optimizer_states": self.optimizer_states,
            "loss_scales": self.loss_scales,
            "method_state": self.method_state,
            "supervised_epochs": self.supervised_epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what `state_dict` described."""
        self.use_local_model(None)
        for role, network_state in state["networks"].items():
            if role == "local":
                self.networks[role] = self.spec.build_model("private", self.number)
            self.networks[role].load_state_dict(network_state)
        self.optimizer_states = state["optimizer_states"]
        self.loss_scales = state.get("loss_scales", {})  # runs before 0.1.0 have none
        self.method_state = state["method_state"]
        self.supervised_epochs = state["supervised_epochs"]


def has_batch_norm(network: nn.Module) -> bool:
    """Whether a network normalizes over its batch, and so cannot train on a single sample."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
