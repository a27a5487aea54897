"""Model card of an export: JSON with stable keys, and the same as Markdown."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import fedekd
from fedekd.atomic import digest
from fedekd.early_exit import ExitPolicy
from fedekd.early_exit.statement import closed_exits, exit_guarantee
from fedekd.export.comparison import Difference
from fedekd.export.served import OUTPUTS
from fedekd.export.specification import ModelSpecification
from fedekd.methods import Client
from fedekd.metrics import METRICS, column_names
from fedekd.reporting.pages import markdown_cell

CARD_FORMAT = 1
"""Version of the keys of a card."""

LICENSE_NOT_STATED = "not stated"

_PACKAGES = ("torch", "lightning", "onnx", "onnxruntime", "safetensors")

_INPUTS = {
    "pixels": "uint8 pixels 0..255; the model scales them to [-1, 1]",
    "scaled_pixels": "float32 in [-1, 1]: 2 (value - low) / (high - low) - 1",
    "table": "float64 rows: numbers, the index of a category in its column, NaN for a missing value; the model imputes,"
    " standardises and encodes them",
}


@dataclass(frozen=True)
class RunFacts:
    """Facts of a finished training for the card of one client.

    Attributes:
        method: Class name of the method.
        rounds: Number of rounds.
        seed: Seed of the run.
        clients: Number of clients of the federation.
        sites: Names of the known clients: all of a run, or the one of a site.
        metrics: Metrics of the served network, or of the deployed candidate, on the test split, by key.
        local_metrics: Those of the local baseline; empty where they are not known.
        policy: Exit policy of the client, if any.
        policy_date: Date of the policy file, if any.
        license: Value of `--license`.
        do_no_harm: Guarantee of do no harm in words; None for a run without it.
    """

    method: str
    rounds: int
    seed: int
    clients: int
    sites: Sequence[str]
    metrics: Mapping[str, float] = field(default_factory=dict)
    local_metrics: Mapping[str, float] = field(default_factory=dict)
    policy: ExitPolicy | None = None
    policy_date: datetime | None = None
    license: str = LICENSE_NOT_STATED
    do_no_harm: str | None = None


def card_values(
    client: Client,
    specification: ModelSpecification,
    facts: RunFacts,
    files: Mapping[str, bytes],
    differences: Mapping[str, Difference],
) -> dict[str, Any]:
    """Return a card as plain values, whose keys are stable within `CARD_FORMAT`.

    Args:
        client: Client whose model is exported.
        specification: Specification of the model.
        facts: Facts of the run.
        files: Content of the exported files by name.
        differences: Difference of each file and the framework.
    """
    splits = client.splits
    return {
        "card_format": CARD_FORMAT,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "license": facts.license,
        "intended_use": f"{specification.task} of inputs from the distribution of the training data of {splits.label}",
        "model": {
            "task": specification.task,
            "deployed": client.deployed_name,
            "members": list(specification.members),
            "class_path": {role: values["class_path"] for role, values in specification.networks.items()},
            "inputs": specification.inputs.to_json() | {"description": _INPUTS[specification.inputs.kind]},
            "outputs": list(OUTPUTS[specification.task]),
            "classes": list(specification.classes),
        },
        "training": {
            "method": facts.method,
            "rounds": facts.rounds,
            "seed": facts.seed,
            "clients": facts.clients,
            "sites": list(facts.sites),
            "client": splits.label,
        },
        "data": {
            "name": client.samples.name,
            "digest": splits.digest(client.samples),
            **{name: len(getattr(splits, name)) for name in ("train", "validation", "test")},
        },
        "metrics": _metrics(client, facts),
        "do_no_harm": facts.do_no_harm,
        "guarantee": _guarantee(facts, specification, client.samples.group is not None),
        "files": [
            {"name": name, "bytes": len(content), "sha256": digest(content), "verification": vars(differences[name])}
            for name, content in files.items()
        ],
        "versions": _versions(),
    }


def _metrics(client: Client, facts: RunFacts) -> dict[str, Any]:
    """Return the metrics of the deployed model on the test split, at the last exit."""
    name, is_local = client.spec.primary.name, client.deployed_role == "local"
    values = facts.local_metrics if is_local else facts.metrics
    score, local = values.get(name, math.nan), facts.local_metrics.get(name, math.nan)
    titles = column_names(METRICS.values(), client.samples.class_names)
    others = {titles.get(key, key): _defined(value) for key, value in values.items() if key != name}
    return {
        "metric": name,
        "split": "test",
        "exit": "last",
        "score": _defined(score),
        "local": _defined(local),
        "delta": _defined(score - local),
        "others": others,
    }


def _defined(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _guarantee(facts: RunFacts, specification: ModelSpecification, is_grouped: bool) -> dict[str, Any] | None:
    """Return the guarantee of the exit policy; None without a certified exit.

    It is that of the exact thresholds, from which those in the program differ by the margins.
    """
    policy = facts.policy
    if policy is None or policy.needs_group or not policy.is_certified:
        return None
    flags = [policy.certified, *(group.certified for group in policy.groups)]
    covered = {exit_ for row in flags for exit_, flag in enumerate(row) if flag}
    margins = (*specification.margins, 0.0)  # the last exit has none
    return {
        "target_risk": policy.target_risk,
        "confidence": policy.confidence,
        "simultaneous_clients": policy.simultaneous_clients,
        "samples": policy.samples,
        "tuning_samples": policy.tuning_samples,
        "mode": policy.mode,
        "score": policy.score,
        "statement": exit_guarantee(policy, is_grouped),
        "closed": closed_exits(policy),
        "groups": {"column": policy.group_by, "names": [group.name for group in policy.groups]},
        "unit": policy.unit,
        "date": None if facts.policy_date is None else facts.policy_date.date().isoformat(),
        "exits": [
            {
                "exit": number + 1,
                **_thresholds(policy, number, margins[number]),
                "samples": policy.exit_counts[number],
            }
            for number in sorted(covered)
        ],
    }


def _thresholds(policy: ExitPolicy, exit_: int, margin: float) -> dict[str, Any]:
    """Return the threshold of an exit, or those of the groups for which it is open."""
    limit = policy.limits[0][exit_]
    if isinstance(limit, int | float):
        return {"threshold": limit, "exported_threshold": limit - margin}
    limits = {group.name: value for group, value in zip(policy.groups, limit, strict=True) if value < math.inf}
    return {"threshold": limits, "exported_threshold": {name: value - margin for name, value in limits.items()}}


def _versions() -> dict[str, str]:
    versions = {"fedekd": fedekd.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def card_text(card: Mapping[str, Any]) -> str:
    """Return the Markdown of a card.

    Args:
        card: Values of `card_values`.
    """
    model, training, data, metrics = card["model"], card["training"], card["data"], card["metrics"]
    inputs = model["inputs"]
    sections: list[tuple[str, Sequence[tuple[str, Any]]]] = [
        (
            "Model",
            [
                ("task", model["task"]),
                ("network", ", ".join(f"{role}: {path}" for role, path in model["class_path"].items())),
                ("deployed", model["deployed"]),
                (
                    "input",
                    f"`{inputs['name']}` (batch, {', '.join(map(str, inputs['shape']))}): {inputs['description']}",
                ),
                *[("column", _column(column)) for column in inputs["columns"]],
                ("outputs", ", ".join(model["outputs"])),
                ("classes", ", ".join(model["classes"]) or "none"),
                ("license", card["license"]),
                ("intended use", card["intended_use"]),
            ],
        ),
        ("Training", [(name, _listed(value)) for name, value in training.items()]),
        ("Data of the client", list(data.items())),
        (
            f"Metrics on the {metrics['split']} split, all samples at the {metrics['exit']} exit",
            [
                (f"{metrics['metric']}", _number(metrics["score"])),
                ("local training", _number(metrics["local"])),
                ("Delta", _number(metrics["delta"])),
                *[(name, _number(value)) for name, value in metrics["others"].items()],
            ],
        ),
        ("Guarantee of the early exits", _guarantee_rows(card["guarantee"])),
        ("Do no harm", [("guarantee", card["do_no_harm"] or "none")]),
        ("Files", [(entry["name"], f"{entry['bytes']} bytes, SHA-256 `{entry['sha256']}`") for entry in card["files"]]),
        ("Software", list(card["versions"].items())),
    ]
    lines = [f"# {training['method']}, {training['client']}", "", f"Exported {card['created']}."]
    for title, rows in sections:
        lines += ["", f"## {title}", "", "| | |", "| --- | --- |"]
        lines += [f"| {name} | {markdown_cell(value)} |" for name, value in rows]
    return "\n".join(lines) + "\n"


def _guarantee_rows(guarantee: Mapping[str, Any] | None) -> list[tuple[str, Any]]:
    if guarantee is None:
        return [("guarantee", "none")]
    exits = "; ".join(f"exit {row['exit']}: score at least {_limit(row['threshold'])}" for row in guarantee["exits"])
    exported = "; ".join(f"exit {row['exit']}: {_limit(row['exported_threshold'])}" for row in guarantee["exits"])
    return [
        ("guarantee", guarantee["statement"]),
        *([("closed exits", guarantee["closed"])] if guarantee["closed"] else []),
        ("rule and score", f"{guarantee['mode']}, {guarantee['score']}"),
        ("certified exits", exits),
        ("thresholds in the files", f"{exported}; lower for round-off. The guarantee is that of the certified ones"),
        ("date of the policy file", guarantee["date"]),
    ]


def _limit(value: Any) -> str:
    """Return one threshold, or those of several groups."""
    if isinstance(value, Mapping):
        return ", ".join(f"{limit:.9g} ({name})" for name, limit in value.items())
    return f"{value:.9g}"


def _column(column: Mapping[str, Any]) -> str:
    names = f": {', '.join(column['categories'])}" if column["categories"] else ""
    return f"`{column['name']}`, {column['kind']}{names}"


def _listed(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.4g}"
