"""Checks that the parts of a federation fit together, before anything is trained."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from fedekd.data import ClientSplits, FederatedDataModule, TensorBatches
from fedekd.do_no_harm.evidence import METRICS
from fedekd.do_no_harm.power import fewest_samples
from fedekd.do_no_harm.rule import FEDERATED, LOCAL, DoNoHarm
from fedekd.errors import UserError, describe_error, require, shorten
from fedekd.federation.aggregate_validation import copy_state
from fedekd.global_state import isolated_rng
from fedekd.methods import FederationSpec, Method
from fedekd.methods.client import has_batch_norm, independent_positions
from fedekd.methods.options import check_scheduler
from fedekd.methods.round_selection import SELECTION_SPLIT, used_splits
from fedekd.methods.serving import exit_of_candidate
from fedekd.models import MultiExitNetwork, check_model
from fedekd.modules import SupervisedModule
from fedekd.modules.phase_callbacks import of_lightning
from fedekd.privacy import GaussianMechanism


@isolated_rng(0)  # a layer may draw in its forward pass
def check_models(spec: FederationSpec, clients: Sequence[ClientSplits]) -> None:
    """Build each model architecture, and run it on two images.

    Args:
        spec: The federation.
        clients: Splits of the clients whose models are checked.

    Raises:
        UserError: If a model does not fit the images, has BatchNorm and would train on batches of one sample, shares
            trained tensors with another model, or cannot be trained with a callback of Lightning.
    """
    smallest = min(clients, key=lambda splits: len(splits.train))
    has_single = spec.batch_size == 1 or len(smallest.train) == 1
    # One client per architecture.
    numbers = {spec.architecture_key(splits.client): splits.client for splits in reversed(clients)}.values()
    built: list[nn.Module] = []
    for role, number in [*(("private", number) for number in numbers), ("proxy", clients[0].client)]:
        network = spec.build_model(role, number)
        check_model(
            network.float().cpu(),
            input_shape=spec.input_shape,
            num_outputs=spec.num_outputs,
            flag=f"client.{role}_model",
        )
        if has_single and has_batch_norm(network):
            raise UserError(
                f"client.{role}_model: expected no BatchNorm, which cannot train on batches of one sample, with"
                f" data.batch_size {spec.batch_size} and {len(smallest.train)} training samples of {smallest.label}."
                f" Raise data.batch_size{'' if smallest.name else ' or data.min_samples'}."
            )
        _try_callbacks(spec, spec.build_model(role, number))
        built.append(network)
        if _shares_parameters(spec.build_model(role, number), built):
            raise UserError(
                f"client.{role}_model: expected new parameters in every model, got parameters that two models share."
                " Create all layers when the model is built."
            )


def _try_callbacks(spec: FederationSpec, network: nn.Module) -> None:
    """Train a network for one step with the callbacks of Lightning, if any.

    Some reject their arguments or the network only in a phase. A user's own callbacks are not tried: their hooks may
    write files, and their exceptions need a traceback.

    Raises:
        UserError: If a callback fails.
    """
    callbacks = of_lightning(spec.trainer.callbacks)
    if not callbacks:
        return
    trainer, kind = spec.trainer, spec.trainer.dtype if spec.task == "regression" else torch.int64
    inputs, targets = torch.zeros(2, *spec.input_shape, dtype=trainer.dtype), torch.zeros(2, dtype=kind)
    device = trainer.torch_device
    batches = TensorBatches(
        inputs.to(device), targets.to(device), torch.arange(2), 2, channels_last=trainer.channels_last
    )
    try:
        replace(trainer, callbacks=callbacks).fit(SupervisedModule(network, spec.task, spec.optimizer), batches, 1)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"trainer.callbacks: expected callbacks that can train a {type(network).__name__}, got"
            f" {shorten(repr(callbacks))}. Training failed with {describe_error(error)}"
        ) from error


def check_schedule(spec: FederationSpec, clients: Sequence[ClientSplits], epochs: int) -> None:
    """Take the steps of the longest schedule of a run.

    Args:
        spec: The federation.
        clients: Splits of the clients that are trained.
        epochs: Most epochs of one network.

    Raises:
        UserError: If the scheduler ends before, as OneCycleLR does after `total_steps`.
    """
    options = spec.client
    if options.scheduler is None:
        return
    if options.scheduler_interval == "step":
        # With a last batch of one sample, which networks without BatchNorm train on.
        batches = -(-max(len(splits.train) for splits in clients) // spec.batch_size)
        epochs *= -(-batches // spec.trainer.accumulate_grad_batches)
    try:
        check_scheduler(options.scheduler, options.optimizer, epochs)
    except UserError as error:
        report = str(error).partition("It reports: ")[2] or str(error)
        raise UserError(
            f"client.scheduler: expected a schedule of at least {epochs} {options.scheduler_interval}s, got"
            f" {shorten(repr(options.scheduler))}. It reports: {report}"
        ) from error


def _shares_parameters(network: nn.Module, others: Sequence[nn.Module]) -> bool:
    """Return whether a network trains a tensor that another one also trains."""
    first, *rest = (
        {part.untyped_storage().data_ptr() for part in model.parameters() if part.requires_grad and part.numel()}
        for model in (network, *others)
    )
    return any(first & pointers for pointers in rest)


def check_required_splits(method: Method, clients: Sequence[ClientSplits]) -> None:
    """Check that clients have samples of the splits that the method needs.

    Raises:
        UserError: If a client has none.
    """
    for splits in clients:
        for split in method.required_splits:
            require(
                len(getattr(splits, split)) > 0,
                "data.fractions",
                f"at least 1 {split} sample of every client for method {type(method).__name__}",
                0,
                f"{splits.label} has {len(splits)} samples. Raise {'' if splits.name else 'data.min_samples or '}the"
                " second of data.fractions.",
            )


def check_round_selection(spec: FederationSpec, clients: Sequence[ClientSplits]) -> None:
    """Check that clients can compare rounds.

    Raises:
        UserError: If a client has no tuning samples.
    """
    for splits in clients if spec.select_round == "best" else ():
        if not len(getattr(splits, SELECTION_SPLIT)):
            raise UserError(
                f"select_round: expected tuning samples of every client for best, got none of {splits.label}."
                f" Raise {'' if splits.name else 'data.min_samples or '}the second of data.fractions."
            )


def check_do_no_harm(
    rule: DoNoHarm, method: Method, data: FederatedDataModule, spec: FederationSpec, warn: Callable[[str], None]
) -> None:
    """Check that clients can compare two models on samples that trained neither.

    Warns of clients with too few samples to deploy the federated model.

    Raises:
        UserError: If a client has no such samples, or an option of the rule does not fit the run.
    """
    name = type(method).__name__
    if method.is_local_baseline:
        raise UserError(f"do_no_harm: expected a federated method to compare with the local baseline, got {name}.")
    if "validation" in method.training_splits:
        raise UserError(
            f"do_no_harm: models are compared on the validation split, which method {name} trains on."
            " Choose another method."
        )
    compared = rule.compared_splits(data.task, used_splits(method, spec))
    if set(compared) & set(method.training_splits):
        raise UserError(
            f"do_no_harm.rule: expected a rule that compares on samples which the method does not use, got"
            f" {rule.rule!r}, whose tuning split method {name} uses. Choose certified."
        )
    if data.task == "classification" and rule.margin >= 1:
        raise UserError(f"do_no_harm.margin: expected a difference of accuracies below 1, got {rule.margin}.")
    if spec.select_round == "best" and SELECTION_SPLIT in compared:
        raise UserError(
            "do_no_harm.rule: expected certified with --select_round best, which chooses the round on the"
            f" {SELECTION_SPLIT} split, got {rule.rule!r}."
        )
    check_candidates(rule, method, spec, range(spec.num_clients))
    _check_metric(rule, data)
    if rule.looks > spec.rounds:
        raise UserError(f"do_no_harm.looks: expected at most {spec.rounds} (rounds), got {rule.looks}.")
    for splits in data.clients:
        if not any(len(getattr(splits, split)) for split in compared):
            raise UserError(
                f"do_no_harm: {splits.label} has no sample in the {' or '.join(compared)} split, on which models are"
                " compared."
                f" Raise {'' if splits.name else 'data.min_samples or '}the second of data.fractions."
            )
    if rule.rule == "certified" and METRICS[rule.metric].per_class:
        _warn_of_few(rule, data, compared, warn, spec.seed)
    elif rule.rule == "certified":
        fewest = fewest_samples(rule, data.task)
        counts = {each.title: _count_compared(rule, data, each, compared) for each in data.clients}
        few = [f"{title} ({count})" for title, count in counts.items() if count < fewest]
        if few:
            warn(
                f"do_no_harm: the test can deploy the federated model with at least {fewest} samples of the"
                f" {' and '.join(compared)} split. These clients have fewer and deploy their local model: "
                + shorten(", ".join(few), 200)
            )


def check_candidates(rule: DoNoHarm, method: Method, spec: FederationSpec, clients: Iterable[int]) -> None:
    """Check that the method and some clients' private models have the candidates.

    Raises:
        UserError: If a candidate is missing, or is not available at each comparison or with `--select_round best`.
    """
    known = list(method.candidates())
    if reserved := [name for name in known if name in (FEDERATED, LOCAL) or exit_of_candidate(name)]:
        raise ValueError(f"candidates of {type(method).__name__}: reserved names {', '.join(sorted(reserved))}")
    if not {*rule.candidates} <= {*known}:
        known += [f"exit_{number}" for number in range(1, _fewest_exits(spec, clients))]
    for name in rule.candidates:
        require(
            name in known,
            "do_no_harm.candidates",
            f"names among {', '.join(known)} for method {type(method).__name__}",
            name,
        )
        require(
            rule.looks == 1 or name not in method.last_round_candidates,
            "do_no_harm.candidates",
            "models that exist at each of several do_no_harm.looks",
            name,
            "It is trained in the last round: choose --do_no_harm.looks 1.",
        )
    require(
        not rule.candidates or spec.select_round == "last",
        "do_no_harm.candidates",
        "none with --select_round best, which keeps the networks of the served model only",
        list(rule.candidates),
        "Choose --select_round last.",
    )


def _fewest_exits(spec: FederationSpec, clients: Iterable[int]) -> int:
    """Return the smallest number of exits of some clients' private models.

    A model without exits counts as one.
    """
    architectures = {spec.architecture_key(number): number for number in clients}
    networks = (spec.build_model("private", number) for number in architectures.values())
    return min(network.num_exits if isinstance(network, MultiExitNetwork) else 1 for network in networks)


def _check_metric(rule: DoNoHarm, data: FederatedDataModule) -> None:
    """Check that the metric fits the task.

    Raises:
        UserError: If it does not.
    """
    metric, option = METRICS[rule.metric], "do_no_harm.metric"
    is_classifier = data.task == "classification"
    require(is_classifier or metric.test is None, option, "accuracy for regression, the squared error", rule.metric)


def _count_compared(rule: DoNoHarm, data: FederatedDataModule, client: ClientSplits, splits: Sequence[str]) -> int:
    """Count the compared samples of a client.

    The server of a federation of sites has no groups, and counts all samples.
    """
    parts = [getattr(client, split) for split in splits]
    if rule.unit == "sample" or data.samples.group is None:
        return sum(map(len, parts))  # a site may claim any size: build nothing of this size
    groups: Tensor = data.samples.group
    return sum(len(torch.unique(groups[part])) for part in parts)


def _warn_of_few(
    rule: DoNoHarm, data: FederatedDataModule, compared: Sequence[str], warn: Callable[[str], None], seed: int
) -> None:
    """Warn of the clients that have too few samples of one of their classes.

    The server of a federation of sites has no labels, and warns of none.
    """
    targets = data.samples.targets
    if not len(targets):
        return
    fewest, parts = fewest_samples(rule, num_classes=data.num_classes), []
    for splits in data.clients:
        indices = []
        for split in compared:
            drawn = independent_positions(data.samples, splits, split, seed) if rule.unit == "group" else slice(None)
            indices.append(getattr(splits, split)[drawn])
        held_out = targets[torch.cat(indices)]
        classes = sorted({*targets[splits.train].tolist(), *held_out.tolist()})
        counts = {label: int((held_out == label).sum()) for label in classes}
        few = [
            f"{shorten(data.samples.class_names[label], 24)}: {count}"
            for label, count in counts.items()
            if count < fewest
        ]
        if few or (METRICS[rule.metric].ranks and len(classes) < 2):
            parts.append(f"{splits.label} ({', '.join(few) or 'one class'})")
    if parts:
        warn(
            f"do_no_harm: the test of {METRICS[rule.metric].title} can deploy the federated model with at least"
            f" {fewest} samples of each class of a client in the {' and '.join(compared)} split. These clients have"
            " fewer and deploy their local model: " + shorten("; ".join(parts), 160)
        )


def check_privacy(mechanism: GaussianMechanism, method: Method, participants: Sequence[int]) -> None:
    """Check that updates can carry noise.

    Args:
        mechanism: Noise of the updates.
        method: Method after `init_server`.
        participants: Clients of round 0.

    Raises:
        UserError: If a message has no tensors or whole numbers.
    """
    method = copy.copy(method)
    method.server_state = copy_state(method.server_state)  # a broadcast may change it, and runs again in the round
    broadcast = method.broadcast(participants, 0)
    for number in participants:
        mechanism.require_supported(broadcast.to(number), type(method).__name__)
