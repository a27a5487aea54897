"""Columns of a file of predictions that a monitor follows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedekd.data import split_inputs
from fedekd.early_exit.client_calibration import input_digests
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.scoring import BATCH_SIZE, network_input
from fedekd.methods import Client
from fedekd.models import eval_mode
from fedekd.modules.prediction import predict
from fedekd.monitoring.policies import policy_hash, short_hash

#: Label of an output that is not finite, which is wrong for every target.
NOT_FINITE = -1

#: Decimals of confidence and disagreement.
_DECIMALS = 6


class MonitoredColumns:
    """Columns of a client's predictions that a monitor follows, batch by batch.

    - `sample`: hash of the input, by which repeated samples and those of the training are found.
    - `model`: short hash of the deployed network.
    - `policy`: hash of the exit policy, see `policy_hash`.
    - `confidence`: largest probability at the last exit, whatever the exit policy; in regression `value_last`,
      the value there.
    - `disagreement`: between private model and proxy, at the last exit: total variation distance of the probabilities,
      or absolute difference of the values. Only with a proxy.
    - `label_federated`, `label_local`: labels at the last exit, which do-no-harm compares; `value_federated` and
      `value_local` in regression. Only with a local model.

    Outputs that are not finite are wrong: label -1, value inf, confidence 0, disagreement 1 or inf.

    Args:
        client: Client of a finished run.
        local: Its local model, or None if do-no-harm is not followed.
        policy: Its exit policy, of all groups; None without one.
    """

    def __init__(self, client: Client, local: nn.Module | None = None, policy: ExitPolicy | None = None) -> None:
        self.client, self.local, self.policy = client, local, policy_hash(policy)
        self.deployed = client.deployed_model
        self.model = short_hash(network_fingerprint(self.deployed))
        self.is_regression = client.spec.task == "regression"

    @torch.no_grad()
    def of_batch(self, batch: Tensor) -> dict[str, list[Any]]:
        """Return the columns of a batch of inputs as in `Samples.inputs`."""
        output = self._last(self.deployed, batch)
        columns: dict[str, list[Any]] = {"sample": list(input_digests(batch))}
        columns |= {name: [value] * len(batch) for name, value in (("model", self.model), ("policy", self.policy))}
        columns |= self._drift_values(output, batch)
        if self.local is not None:
            for name, each in (("federated", output), ("local", self._last(self.local, batch))):
                is_finite = each.isfinite().all(dim=1)
                columns |= (
                    {f"value_{name}": each[:, 0].masked_fill(~is_finite, torch.inf).tolist()}
                    if self.is_regression
                    else {f"label_{name}": each.argmax(dim=1).masked_fill(~is_finite, NOT_FINITE).tolist()}
                )
        return columns

    @torch.no_grad()
    def drift_values(self, inputs: Any) -> dict[str, list[float]]:
        """Return the columns of drift tests, such as `confidence` and `disagreement`.

        Args:
            inputs: n samples, as in `Samples.inputs`.
        """
        values: dict[str, list[float]] = {}
        for batch in split_inputs(inputs, BATCH_SIZE):
            for name, part in self._drift_values(self._last(self.deployed, batch), batch).items():
                values.setdefault(name, []).extend(part)
        return values

    def _drift_values(self, output: Tensor, batch: Tensor) -> dict[str, list[float]]:
        networks = self.client.networks
        if self.is_regression:
            values = {"value_last": output[:, 0].nan_to_num(torch.inf, torch.inf, -torch.inf).tolist()}
        else:
            values = {"confidence": _rounded(output.softmax(dim=1).amax(dim=1).nan_to_num(0.0))}
        if "proxy" in networks:
            pair = self._last(networks["private"], batch), self._last(networks["proxy"], batch)
            values["disagreement"] = _rounded(self._disagreement(*pair))
        return values

    def _last(self, network: nn.Module, batch: Tensor) -> Tensor:
        """Return the outputs of the last exit in the unit of the targets, float64."""
        with eval_mode(network):
            output = predict(network, network_input(network, batch)).output
        return self.client.in_target_unit(output).double().cpu()

    def _disagreement(self, private: Tensor, proxy: Tensor) -> Tensor:
        if self.is_regression:
            return (private - proxy)[:, 0].abs().nan_to_num(torch.inf, torch.inf)
        return ((private.softmax(dim=1) - proxy.softmax(dim=1)).abs().sum(dim=1) / 2).nan_to_num(1.0)


def _rounded(values: Tensor) -> list[float]:
    return [round(value, _DECIMALS) for value in values.tolist()]
