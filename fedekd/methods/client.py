"""A client: its data, its networks, and its state between rounds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor, nn

from fedekd.data import (
    ClientSplits,
    Samples,
    TensorBatches,
    build_transform,
    in_memory_format,
    input_batches,
    scale,
)
from fedekd.errors import require
from fedekd.functional import all_finite, class_log_odds, log_label_prior, upcast_to_float32
from fedekd.global_state import isolated_rng, seed_generators
from fedekd.methods.client_state import client_state, load_client_state, load_served_state, served_state
from fedekd.methods.serving import CANDIDATE, ENSEMBLE, LOCAL, Candidate, Serving
from fedekd.methods.specification import FederationSpec
from fedekd.metrics import compute_metrics, score
from fedekd.models import MultiExitNetwork, build_ensemble, eval_mode
from fedekd.models.freezing import keeps_statistics
from fedekd.modules import ModelOutput, ObjectiveModule, predict
from fedekd.modules.schedule import Schedule
from fedekd.seeding import derive_seed


@contextmanager
def _named_failure(place: str) -> Iterator[None]:
    """Context manager: add the place to an exception, often of a user's code."""
    try:
        yield
    except Exception as error:
        error.add_note(place)
        raise


class PhaseOptions(TypedDict, total=False):
    """Optional arguments of `Client.train_supervised` and `Client.train`.

    Attributes:
        epochs: Number of epochs (default: `client.local_epochs`).
        first_epoch: Number of the first epoch within the phase, for the seed (default: 0).
        teacher_outputs: Tensors of the frozen teacher for the training split, in order (`Client.teacher_outputs`);
            without them a teacher runs at every step. They are not used where training samples are augmented.
        positions: Positions within the training split of the samples to train on, int64, shape (n,), with which
            `teacher_outputs` are aligned (default: all).
        carry_optimizer: Continue from the optimizer state of the last phase of this role, and keep the new state
            (default: False). The schedule of the learning rate is carried in any case.
        decay_rounds: How often `client.lr_decay` is applied (default: once per completed supervised round).
        lr_factor: Further factor of all learning rates (default: 1).
    """

    epochs: int | None
    first_epoch: int
    teacher_outputs: tuple[Tensor, ...]
    positions: Tensor | None
    carry_optimizer: bool
    decay_rounds: int | None
    lr_factor: float


class Client:
    """One client of a federation.

    Its state between rounds is in `state_dict`: networks, optimizer states, the method's state, and the number of
    supervised epochs. The data are passed in and never part of the state.

    Args:
        number: Number of the client, from 0.
        splits: Indices of the client's samples.
        samples: The data set on the training device, shared by all clients of a process.
        spec: How networks are built and trained.

    Attributes:
        networks: Networks by role: `private`, and those that `Method.init_client` adds.
        optimizer_states: By role, the optimizer states that are carried from round to round.
        scheduler_states: By role, the states of learning rate schedules, which are carried from phase to phase.
        loss_scales: By role, the state of the float16 loss scaler; empty in other precisions.
        method_state: State that the method keeps on the client: tensors, numbers and dicts of them.
        supervised_epochs: Epochs of supervised training of the private model; counted by `train_supervised`.
        serving: How the networks are combined at serving time; None serves the private model.
        candidate: Model that do-no-harm deploys in place of what is served; None deploys what is served, or the local
            model.
        selected: Best round so far, with `--select_round best`; see `fedekd.methods.round_selection`. None without one.
        training_splits: Splits that the method's training uses.
    """

    training_splits: tuple[str, ...] = ("train",)

    def __init__(self, number: int, splits: ClientSplits, samples: Samples, spec: FederationSpec) -> None:
        self.number, self.splits, self.samples, self.spec = number, splits, samples, spec
        self.networks: dict[str, nn.Module] = {"private": spec.build_model("private", number)}
        self.optimizer_states: dict[str, dict[str, Any]] = {}
        self.scheduler_states: dict[str, dict[str, Any]] = {}
        self.loss_scales: dict[str, dict[str, Any]] = {}
        self.method_state: dict[str, Any] = {}
        self.supervised_epochs = 0
        self.serving: Serving | None = None
        self.candidate: Candidate | None = None
        self.selected: dict[str, Any] | None = None

    @property
    def served_role(self) -> str:
        """Role of what the method serves: `private`, or `ensemble` of several networks."""
        return "private" if self.serving is None else ENSEMBLE

    def network(self, role: str) -> nn.Module:
        """Return the network of a role; `ensemble` is built from its members.

        Args:
            role: A key of `networks`, `ensemble` where `serving` is set, or `candidate` where a candidate is deployed.
        """
        if role == CANDIDATE and self.candidate is not None:
            network, depth = self.combined(self.candidate.serving), self.candidate.depth
            if depth is None:
                return network
            exits = network.num_exits if isinstance(network, MultiExitNetwork) else 1
            require(depth < exits, "do_no_harm.candidates", f"exits below {exits} at {self.splits.label}", depth)
            assert isinstance(network, MultiExitNetwork)
            return network.shallow(depth)
        return self.networks[role] if role != ENSEMBLE or self.serving is None else self.combined(self.serving)

    def combined(self, serving: Serving | None) -> nn.Module:
        """Return the network that a combination serves; None is the private model."""
        if serving is None:
            return self.networks["private"]
        members = {name: self.networks[name] for name in serving.members}
        ensemble = build_ensemble(members, serving.weights, serving.offsets, self.spec.task)
        return ensemble.to(self.spec.trainer.torch_device)

    def single(self, role: str, offset: Tensor | None = None) -> Serving:
        """Return how one of the networks is served.

        Args:
            role: A key of `networks`.
            offset: Added to its outputs, shape (C,). Default 0.
        """
        zeros = torch.zeros(1, self.spec.num_outputs, dtype=self.spec.trainer.dtype)
        offsets = zeros if offset is None else offset.detach().cpu()[None].to(zeros)
        return Serving((role,), torch.ones(1, dtype=zeros.dtype), offsets)

    @torch.no_grad()
    def member_outputs(self, x: Tensor, exits: Tensor) -> dict[str, Tensor]:
        """Return the outputs of each deployed member; empty for one network.

        Args:
            x: Inputs, shape (B, ...).
            exits: Exit of each sample in the ensemble, from 0, shape (B,); members without exits have one output.

        Returns:
            By role, logits or values in the unit of the targets, with the offset of the member, shape (B, C).
        """
        outputs = {}
        serving = self.deployed_serving
        for role, offset in () if serving is None else zip(serving.members, serving.offsets, strict=True):
            network = self.networks[role]
            with eval_mode(network):
                every = predict(network, x).exits
            stacked = torch.stack(every)
            rows = torch.arange(len(x), device=stacked.device)
            chosen = stacked[exits.to(stacked.device).clamp(max=len(every) - 1), rows]
            outputs[role] = self.in_target_unit(upcast_to_float32(chosen) + offset.to(chosen.device))
        return outputs

    @property
    def training_targets(self) -> Tensor:
        """Targets in the unit of the networks' outputs, shape (N,).

        Real-valued targets are standardised by the client's training targets; classes and grades are unchanged.
        """
        if self.samples.num_classes:
            return self.samples.targets
        standardised = (self.samples.targets.double() - self.splits.target_shift) / self.splits.target_scale
        return standardised.to(self.spec.trainer.dtype)

    def in_target_unit(self, outputs: Tensor) -> Tensor:
        """Return outputs of a network in the unit of the targets, where that differs.

        Args:
            outputs: Logits, grades, or standardised values, any shape; only the values change, and become float64.
        """
        if self.samples.num_classes:
            return outputs
        return outputs.double() * self.splits.target_scale + self.splits.target_shift

    @property
    def class_weights(self) -> Tensor | None:
        """Weight of each class in the supervised loss, shape (C,); None for equal ones."""
        if self.spec.client.class_weights is None:
            return None
        targets = self.samples.targets
        counts = torch.bincount(
            targets[self.splits.train.to(targets.device)], minlength=self.samples.num_classes
        ).double()
        present = counts > 0
        # 0 for a class without training samples: no sample has this weight.
        weights = torch.where(present, counts.sum() / (present.sum() * counts.clamp_min(1)), 0.0)
        return weights.to(self.spec.trainer.dtype)

    @property
    def label_prior(self) -> Tensor:
        """Label prior of the client's supervised loss, shape (C,), float64, all above 0.

        Each class counts one sample more than the training split has. Samples count with their class weights, which
        change the prior that a network learns.
        """
        return log_label_prior(self._label_counts.cpu(), smoothing=1.0).exp()

    def log_label_prior(self, smoothing: float) -> Tensor:
        """Return the logarithm of the label prior of the client's supervised loss.

        Args:
            smoothing: Pseudo-count of each class, above 0.

        Returns:
            Log-probabilities, shape (C,), in the dtype of the weights.
        """
        return log_label_prior(self._label_counts, smoothing).to(self.spec.trainer.dtype)

    @property
    def _label_counts(self) -> Tensor:
        """Training samples of each class times its class weight, float64, shape (C,)."""
        counts = torch.bincount(self.targets("train"), minlength=self.spec.num_outputs).double()
        weights = self.class_weights
        return counts if weights is None else counts * weights.to(counts)

    @property
    def supervised_rounds(self) -> int:
        """Completed supervised rounds; Delta uses the baseline after the same number."""
        return self.supervised_epochs // self.spec.client.local_epochs

    def train_supervised(
        self,
        module: ObjectiveModule,
        round_idx: int | None = None,
        *,
        is_counted: bool = True,
        **options: Unpack[PhaseOptions],
    ) -> dict[str, float]:
        """Train the private model and count its supervised epochs.

        The loss includes the labels, and possibly further terms. The count pairs Delta with the local baseline and
        drives `client.lr_decay`.

        Args:
            module: The LightningModule that trains `networks["private"]`.
            round_idx: Round, for the seed. None is the client's next supervised round, as in the local baseline, which
                then sees the same batches in the same order.
            is_counted: False for fine-tuning, which has no counterpart in the local baseline.
            **options: See `PhaseOptions`.

        Returns:
            Means that the module recorded in the last epoch, such as `loss` and `gate/weight_mean`.
        """
        round_idx = self.supervised_rounds + 1 if round_idx is None else round_idx
        means = self._train("private", module, round_idx, **options)
        epochs = options.get("epochs")
        if is_counted:
            self.supervised_epochs += self.spec.client.local_epochs if epochs is None else epochs
        return means

    def train(
        self, role: str, module: ObjectiveModule, round_idx: int, **options: Unpack[PhaseOptions]
    ) -> dict[str, float]:
        """Train a network other than the private model for one phase of a round.

        The order of batches and all other random choices of an epoch depend only on (seed, client, round, role,
        epoch): a phase may be trained in one call, or epoch by epoch in turn with another phase.

        Args:
            role: Name of the phase and of the optimizer state, usually that of the network; not `private`.
            module: The LightningModule that trains the network.
            round_idx: Round, for the seed.
            **options: See `PhaseOptions`.

        Returns:
            Means that the module recorded in the last epoch.

        Raises:
            ValueError: If the role is `private`, whose epochs must be counted.
        """
        if role == "private":
            raise ValueError("role: expected another network than 'private'. Use Client.train_supervised for that one")
        return self._train(role, module, round_idx, **options)

    def _train(
        self,
        role: str,
        module: ObjectiveModule,
        round_idx: int,
        *,
        epochs: int | None = None,
        first_epoch: int = 0,
        teacher_outputs: tuple[Tensor, ...] = (),
        positions: Tensor | None = None,
        carry_optimizer: bool = False,
        decay_rounds: int | None = None,
        lr_factor: float = 1.0,
    ) -> dict[str, float]:
        spec, trainer = self.spec, self.spec.trainer
        epochs = spec.client.local_epochs if epochs is None else epochs

        def begin_epoch(epoch: int) -> torch.Generator:
            seed = derive_seed(spec.seed, self.number, round_idx, role, first_epoch + epoch)
            seed_generators(seed, trainer.torch_device)  # for layers such as dropout
            return torch.Generator().manual_seed(seed)

        batches = TensorBatches(
            self.samples.inputs,
            self.training_targets,
            self.splits.train if positions is None else self.splits.train[positions],
            spec.batch_size,
            generator=begin_epoch,
            extras=() if spec.transform else teacher_outputs,  # those are of the samples without augmentation
            min_batch=2 if has_batch_norm(module.network) else 1,
            channels_last=trainer.channels_last,
            transform=None if spec.transform is None else build_transform(spec.transform),
        )
        module.set_class_weights(self.class_weights)
        if carry_optimizer:
            module.carries_optimizer_state = True
            module.optimizer_state = self.optimizer_states.get(role)
        module.loss_scale = self.loss_scales.get(role, {})
        if spec.client.scheduler is not None:
            module.schedule = Schedule(spec.scheduler, spec.client.scheduler_interval, self.scheduler_states.get(role))
        decay_rounds = self.supervised_rounds if decay_rounds is None else decay_rounds
        module.lr_factor = lr_factor * spec.client.lr_decay**decay_rounds
        # Each epoch has its own seed.
        failure = _named_failure(f"{self.splits.label}: training '{role}'")
        with isolated_rng(spec.seed, trainer.torch_device), failure:
            trainer.fit(module, batches, epochs)
        if carry_optimizer:
            assert module.optimizer_state is not None
            self.optimizer_states[role] = module.optimizer_state
        if module.schedule is not None and (state := module.schedule.state_dict()) is not None:
            self.scheduler_states[role] = state
        if module.loss_scale:
            self.loss_scales[role] = module.loss_scale
        return module.epoch_means

    @torch.no_grad()  # not inference mode: a student's backward pass may save these tensors
    def predict(
        self, role: str | nn.Module, split: str, with_features: bool = False, *, mixed: bool = True
    ) -> ModelOutput:
        """Return a network's outputs for all samples of a split, in order.

        Real values are standardised; see `in_target_unit`.

        Args:
            role: Network, or `ensemble`; or a network that is not part of the client, such as an external teacher.
            split: `train`, `validation`, `tuning`, `calibration`, `holdout` or `test`.
            with_features: Also return the features.
            mixed: Use the mixed precision of training, if any; False uses the precision of the weights.
        """
        network, role = (role, "teacher") if isinstance(role, nn.Module) else (self.network(role), role)
        trainer = self.spec.trainer
        indices = getattr(self.splits, split).to(self.samples.inputs.device)
        outputs = []
        seed = derive_seed(self.spec.seed, self.number, role, split, "predict")  # for layers that draw here, too
        autocast = trainer.autocast() if mixed else nullcontext()
        failure = _named_failure(f"{self.splits.label}: evaluating '{role}' on the {split} split")
        with isolated_rng(seed, trainer.torch_device), eval_mode(network), autocast, failure:
            parts = torch.split(indices, self.spec.eval_batch_size) if len(indices) else ()
            for inputs in input_batches(self.samples.inputs, parts):
                x = in_memory_format(scale(inputs).to(trainer.dtype), trainer.memory_format)
                outputs.append(predict(network, x, with_features))
        if not outputs:
            empty = torch.empty(0, self.spec.num_outputs, device=self.samples.inputs.device)
            return ModelOutput((empty,) * getattr(network, "num_exits", 1))
        exits = tuple(torch.cat(logits) for logits in zip(*(output.exits for output in outputs), strict=True))
        features = None
        if with_features:
            features = torch.cat([output.features for output in outputs if output.features is not None])
        return ModelOutput(exits, features)

    def teacher_outputs(self, role: str | nn.Module, with_features: bool = False) -> tuple[Tensor, ...]:
        """Return the outputs of a frozen teacher for the training split.

        They are computed once per phase, not once per epoch. Where training samples are augmented they are empty: the
        teacher then runs at every step on the augmented batch.

        Args:
            role: Network, or one that is not part of the client.
            with_features: Also return the features.

        Returns:
            `ModelOutput.tensors`, for `PhaseOptions.teacher_outputs`.

        Reference:
            Beyer et al., Knowledge distillation: A good teacher is patient and consistent, CVPR 2022.
        """
        return () if self.spec.transform else self.predict(role, "train", with_features).tensors

    def score(self, split: str = "test", role: str | None = None) -> float:
        """Return the task's primary metric on a split, by default of the served network."""
        return score(*self._outputs_and_targets(split, role)[-1], self.spec.task)

    def evaluate(self, split: str = "test", role: str | None = None) -> tuple[list[float], dict[str, float]]:
        """Score a network on a split, by default the served one.

        Returns:
            The primary metric of the run at each exit; a plain network has one. All metrics of the last exit by key, as
            `fedekd.metrics.compute_metrics`.
        """
        *earlier, last = self._outputs_and_targets(split, role)
        metric, num_classes = self.spec.primary, self.samples.num_classes
        values = compute_metrics(*last, self.spec.task, num_classes)
        exit_scores = [metric.values(*pair, num_classes)[metric.name] for pair in earlier]
        return [*exit_scores, values[metric.name]], values

    def _outputs_and_targets(self, split: str, role: str | None) -> list[tuple[Tensor, Tensor]]:
        """Return the outputs of each exit and the targets, in the unit of the targets."""
        output = self.predict(role or self.served_role, split)
        return [(self.in_target_unit(logits), self.targets(split)) for logits in output.exits]

    def targets(self, split: str) -> Tensor:
        """Return the targets of a split in their own unit, shape (n,)."""
        return self.samples.targets[getattr(self.splits, split).to(self.samples.targets.device)]

    def independent_positions(self, split: str) -> Tensor:
        """Return positions within a split of one sample of each group.

        A sample of a group, such as a patient, is drawn uniformly; the draw depends only on seed, client and split.
        Without groups these are all samples.

        Args:
            split: Name of the split, of n samples.

        Returns:
            Ascending positions, int64, on the CPU.
        """
        return independent_positions(self.samples, self.splits, split, self.spec.seed)

    def held_out(self, split: str, role: str | None = None, with_classes: bool = False) -> tuple[Tensor, Tensor]:
        """Return the served network's losses and class scores of a split.

        Mixed precision is off, because do-no-harm compares the model as `predict` deploys it.

        Args:
            split: Name of the split, of n samples.
            role: Network; None is what is served.
            with_classes: Also return the scores of more than two classes.

        Returns:
            Loss of each sample, 0 or 1 or the squared error, float64, shape (n,); a non-finite output counts as wrong,
            or as infinitely far off. And float64 scores that rank the samples. For two classes: log odds of class 1,
            shape (n,). For more classes and `with_classes`: log odds of each, shape (n, C). Otherwise: shape (0,). A
            non-finite output gets the scores that are wrong for its target.
        """
        output = self.in_target_unit(self.predict(role or self.served_role, split, mixed=False).output)
        targets = self.targets(split)
        losses = self._losses(output, targets)
        if self.spec.task == "regression" or (self.spec.num_outputs > 2 and not with_classes):
            return losses, losses.new_empty(0)
        is_finite = output.isfinite().all(dim=1)
        if self.spec.num_outputs > 2:
            is_target = torch.nn.functional.one_hot(targets, self.spec.num_outputs).bool()
            all_wrong = torch.where(is_target, -torch.inf, torch.inf).to(losses)
            return losses, torch.where(is_finite[:, None], class_log_odds(output), all_wrong)
        odds = (output[:, 1] - output[:, 0]).double()
        wrong = torch.where(targets == 1, -torch.inf, torch.inf).to(odds)
        return losses, torch.where(is_finite, odds, wrong)

    def _losses(self, output: Tensor, targets: Tensor) -> Tensor:
        """Return the losses of outputs in the unit of the targets."""
        finite = output.isfinite().all(dim=1)
        if self.spec.task == "regression":
            return torch.where(finite, (output.double().squeeze(1) - targets.double()).square(), torch.inf)
        return ((output.argmax(dim=1) != targets) | ~finite).double()

    def supervised_loss(self, split: str) -> float:
        """Return the served network's mean cross-entropy or squared error.

        NaN without samples. Squared errors are in the unit of the outputs.
        """
        output = self.predict(self.served_role, split, mixed=False).output.double()
        targets = self.training_targets[getattr(self.splits, split).to(self.samples.targets.device)]
        if self.spec.task == "regression":
            return float(torch.nn.functional.mse_loss(output.squeeze(1), targets.double()))
        return float(torch.nn.functional.cross_entropy(output, targets))

    @property
    def deployed_role(self) -> str:
        """Role of the deployed network: `local`, `candidate`, or what is served."""
        if LOCAL in self.networks:
            return LOCAL
        return self.served_role if self.candidate is None else CANDIDATE

    @property
    def deployed_name(self) -> str:
        """Name of the deployed model: the role, or the name of the candidate."""
        if self.deployed_role == CANDIDATE and self.candidate is not None:
            return self.candidate.name
        return self.deployed_role

    @property
    def deployed_serving(self) -> Serving | None:
        """Combination of networks that is deployed; None for one of `networks`."""
        if self.deployed_role == CANDIDATE and self.candidate is not None:
            return self.candidate.serving
        return self.serving if self.deployed_role == ENSEMBLE else None

    @property
    def deployed_model(self) -> nn.Module:
        """Network in use after the last round."""
        return self.network(self.deployed_role)

    def use_local_model(self, local: Client | None) -> None:
        """Deploy the local or the federated model; the federated model stays stored.

        Args:
            local: The client of the local baseline; None for the federated model.
        """
        self.networks.pop(LOCAL, None)
        self.candidate = None
        if local is not None:
            self.networks[LOCAL] = local.networks["private"]

    def use_candidate(self, candidate: Candidate) -> None:
        """Deploy one of the models that the method declares."""
        self.use_local_model(None)
        self.candidate = candidate

    @contextmanager
    def trial(self, candidate: Candidate) -> Iterator[None]:
        """Context manager: make `candidate` the network of the role `candidate`."""
        before, self.candidate = self.candidate, candidate
        try:
            yield
        finally:
            self.candidate = before

    def load_received(self, received: Mapping[str, Tensor]) -> None:
        """Load received tensors into the private model, and keep its other tensors.

        Kept tensors that are not finite, after diverged training, are re-initialised: no later message replaces them.
        """
        network = self.networks["private"]
        personal = {name: tensor for name, tensor in network.state_dict().items() if name not in received}
        if not all_finite(personal.values()):
            initial = self.spec.build_model("private", self.number).state_dict()
            personal = {name: tensor if all_finite([tensor]) else initial[name] for name, tensor in personal.items()}
        network.load_state_dict({**personal, **received})

    def state_dict(self) -> dict[str, Any]:
        """Return the client's state as plain tensors, numbers and dicts.

        Frozen tensors of pretrained weights are left out; `load_state_dict` takes them from the new network.
        """
        return client_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""
        load_client_state(self, state)

    def served_state(self) -> dict[str, Any]:
        """Return the state of what is served: its networks, and how they are combined."""
        return served_state(self)

    def load_served_state(self, state: Mapping[str, Any]) -> None:
        """Serve what `served_state` returned."""
        load_served_state(self, state)


def independent_positions(samples: Samples, splits: ClientSplits, split: str, seed: int) -> Tensor:
    """See `Client.independent_positions`.

    Args:
        samples: The data set.
        splits: Splits of the client.
        split: Name of the split.
        seed: Seed of the federation.
    """
    return samples.one_per_group(getattr(splits, split), derive_seed(seed, splits.client, "unit", split))


def has_batch_norm(network: nn.Module) -> bool:
    """Return True if a network trains BatchNorm, which cannot train on one sample."""
    norms = (part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm))
    return not all(keeps_statistics(part) for part in norms)
