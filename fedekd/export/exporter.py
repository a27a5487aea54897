"""Export the deployed model of a client as verified files."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from fedekd.data import FederatedDataModule
from fedekd.early_exit import ExitPolicy, network_fingerprint
from fedekd.export.card import RunFacts, card_text, card_values
from fedekd.export.comparison import (
    MOST_SAMPLES,
    Difference,
    HeldOut,
    compare,
    exit_times,
    held_out,
    held_out_inputs,
    module_outputs,
    open_session,
    round_off_margins,
    session_outputs,
)
from fedekd.export.folder import CARD, CARD_TEXT
from fedekd.export.programs import onnx_program, torch_program
from fedekd.export.served import ServedNetwork
from fedekd.export.specification import ModelSpecification, deployed_tensors, specify
from fedekd.export.weights_file import unpack_export, weights_file
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork
from fedekd.models.lora import merged
from fedekd.models.weights import METADATA_KEY

FORMATS = ("safetensors", "torch", "onnx")
"""Formats of an export."""

FULL, EARLY = "model.onnx", "model_early_exit.onnx"
"""Names of the ONNX files: any batch size; one sample, for which nothing is computed after its exit."""


@dataclass(frozen=True)
class Export:
    """Verified files of an export.

    Attributes:
        files: Content by name, the cards included.
        differences: Difference of each model file and the framework.
        times: Milliseconds per sample in onnxruntime, see `exit_times`; empty for other formats and without open exits.
    """

    files: Mapping[str, bytes]
    differences: Mapping[str, Difference]
    times: Mapping[str, float] = field(default_factory=dict)


def export_model(data: FederatedDataModule, client: Client, format: str, facts: RunFacts) -> Export:
    """Export the deployed model of a client, verified on its held-out inputs.

    Args:
        data: Data module of the run.
        client: Client of a finished run.
        format: One of `FORMATS`.
        facts: Facts of the run for the card; its policy is exported.

    Returns:
        Files by name, not yet written, with their differences to the framework.

    Raises:
        UserError: If the model diverged or cannot be exported, or the export differs from the framework.
    """
    policy = exported_policy(client, facts.policy)
    specification = specify(data, client, policy)
    served = served_network(client, specification, policy)
    margins = round_off_margins(served, held_out_inputs(client, served))
    specification = replace(specification, margins=margins)
    served = served_network(client, specification, policy)
    raw = held_out_inputs(client, served, MOST_SAMPLES)
    expected = held_out(data, client, facts.policy, served, raw)
    metadata = {METADATA_KEY: specification.to_json()}
    times: Mapping[str, float] = {}
    if format == "safetensors":
        files = {"model.safetensors": weights_file(deployed_tensors(client, specification), specification)}
        differences = {name: _verify_weights(name, content, expected) for name, content in files.items()}
    elif format == "torch":
        files = {"model.pt2": torch_program(served, specification.inputs, metadata)}
        differences = {name: _verify_program(name, content, expected, specification) for name, content in files.items()}
    else:
        files = {FULL: onnx_program(served, specification.inputs, metadata, early_exit=False)}
        if served.has_open_exits:
            files[EARLY] = onnx_program(served, specification.inputs, metadata, early_exit=True)
        differences, times = _verify_onnx(files, expected, specification)
    card = card_values(client, specification, facts, files, differences)
    cards = {CARD: json.dumps(card, indent=1).encode() + b"\n", CARD_TEXT: card_text(card).encode()}
    return Export(files | cards, differences, times)


def exported_policy(client: Client, policy: ExitPolicy | None) -> ExitPolicy | None:
    """Return the policy for the exported network, whose adapters are merged.

    Scores of both networks differ by rounding only. The export is compared with the calibrated network.

    Raises:
        UserError: If the policy was calibrated for another network.
    """
    network = client.deployed_model
    if policy is None or not policy.network or not isinstance(network, MultiExitNetwork):
        return policy
    exported = merged(network)
    if exported is network:
        return policy
    policy.require(network, client.networks.get("proxy"))
    return replace(policy, network=network_fingerprint(exported))


def served_network(client: Client, specification: ModelSpecification, policy: ExitPolicy | None) -> ServedNetwork:
    """Return a copy of the deployed model on the CPU, with merged adapters."""
    proxy = client.networks.get("proxy") if policy is not None and policy.uses_proxy else None
    network = _copy(client.deployed_model)
    return specification.serve(network, policy, None if proxy is None else _copy(proxy))


def _copy(network: nn.Module) -> nn.Module:
    return copy.deepcopy(merged(network)).cpu().to(memory_format=torch.contiguous_format).eval()


def _verify_weights(name: str, content: bytes, expected: HeldOut) -> Difference:
    tensors, specification = unpack_export(content, name)
    served = specification.build_served(tensors, specification.modules)
    outputs = module_outputs(served, specification.task, expected.raw)
    return compare(name, outputs, expected, specification.target_scale)


def _verify_program(name: str, content: bytes, expected: HeldOut, specification: ModelSpecification) -> Difference:
    program = torch.export.load(io.BytesIO(content)).module()
    outputs = module_outputs(program, specification.task, expected.raw)
    return compare(name, outputs, expected, specification.target_scale)


def _verify_onnx(
    files: Mapping[str, bytes], expected: HeldOut, specification: ModelSpecification
) -> tuple[dict[str, Difference], Mapping[str, float]]:
    sessions = {name: open_session(content) for name, content in files.items()}
    differences = {
        name: compare(
            name,
            session_outputs(session, expected.raw, single=name == EARLY),
            expected,
            specification.target_scale,
        )
        for name, session in sessions.items()
    }
    if EARLY not in sessions:
        return differences, {}
    return differences, exit_times(sessions[FULL], sessions[EARLY], expected.raw, expected.outputs["exit"])
