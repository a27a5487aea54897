"""`export`: write the deployed model of a client for other programs."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from jsonargparse import ArgumentParser

from fedekd.cli.arguments import (
    add_client_argument,
    add_trained_arguments,
    policy_of_group,
    select_client,
    warn_without_guarantee,
)
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.options import parse
from fedekd.configuration.trained import Trained, open_trained, require_one_source
from fedekd.do_no_harm.statement import do_no_harm_guarantee
from fedekd.early_exit.policy_files import policy_path
from fedekd.errors import UserError, listed, print_warning, require_choice
from fedekd.export.card import LICENSE_NOT_STATED, RunFacts
from fedekd.export.exporter import FORMATS, Export, export_model
from fedekd.export.folder import check_folder, write_folder
from fedekd.methods import Client
from fedekd.models import MultiExitNetwork


def export_parser() -> ArgumentParser:
    """Create the parser of `export`."""
    parser = ArgumentParser(
        prog="orchestrator.py export",
        usage="%(prog)s RUN | --site FOLDER --format safetensors|torch|onnx [--client K] [--output FOLDER]",
        description="Export the deployed model of one client of a finished run, with its exit policy and a model card."
        " The files are compared with the framework on the client's held-out inputs before they are written.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_trained_arguments(parser)
    add_client_argument(parser)
    parser.add_argument(
        "--format",
        type=str,
        default="",
        help="safetensors: weights with the specification of the model; torch: a program of torch.export (.pt2); onnx:"
        " model.onnx for any batch size, and for a network with open exits model_early_exit.onnx for one sample.",
    )
    parser.add_argument(
        "--output",
        type=str,
        default="",
        help="New folder, or one of an earlier export, which is replaced (default: RUN/export/client-000-FORMAT).",
    )
    parser.add_argument(
        "--group",
        type=str | None,
        default=None,
        help="Group of all inputs of the exported model, if the exit policy has thresholds per group of a column;"
        " without it all exits are closed.",
    )
    parser.add_argument("--license", type=str, default=LICENSE_NOT_STATED, help="License of the model, for its card.")
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `export RUN`; writes one folder, or nothing."""
    config = parse(export_parser(), argv)
    if not config.format:
        raise UserError(
            f"--format: expected one of {', '.join(FORMATS)}, got none. Example: export runs/NAME --format onnx"
        )
    require_choice("--format", config.format, FORMATS)
    require_one_source("export", config.run, config.site)
    if config.output:
        check_folder(Path(config.output))
    trained = open_trained("export", config.run, config.site)
    client = select_client(trained, config.client)
    output = Path(config.output or trained.folder / "export" / f"client-{client.number:03d}-{config.format}")
    check_folder(output)
    result = export_model(trained.data, client, config.format, _facts(trained, client, config.license, config.group))
    write_folder(output, result.files)
    for line in _lines(result):
        print(line)
    print(f"written to {output}")
    return 0


def _facts(trained: Trained, client: Client, license: str, group: str | None) -> RunFacts:
    """Collect the facts of the card; warn if the model has exits without a policy."""
    spec, number = trained.spec, client.number
    policy = trained.policy(client) if isinstance(client.deployed_model, MultiExitNetwork) else None
    date = None
    if policy is not None:
        date = datetime.fromtimestamp(policy_path(trained.folder, number).stat().st_mtime, UTC)
    if group is not None:
        policy = policy_of_group(policy, group)
    warn_without_guarantee(trained, client, policy)
    if policy is not None and policy.needs_group:
        print_warning(
            f"--group: the exit policy has thresholds per group of {policy.group_by!r}, and the exported model takes"
            f" the last exit. Export one model per group: {listed(each.name for each in policy.groups)}"
        )
    record, rule = trained.records[number], trained.do_no_harm
    compared = None if record.comparison is None else record.comparison.samples
    is_grouped = client.samples.group is not None
    return RunFacts(
        method=type(trained.method).__name__,
        rounds=spec.rounds,
        seed=spec.seed,
        clients=spec.num_clients,
        sites=[known.splits.label for known in trained.clients],
        metrics=record.metrics if client.candidate is None else record.deployed_metrics,
        local_metrics=trained.local_metrics.get(number, {}),
        policy=policy,
        policy_date=date,
        license=license,
        do_no_harm=None if rule is None else do_no_harm_guarantee(rule, client.spec.task, compared, is_grouped),
    )


def _lines(result: Export) -> list[str]:
    """Return one line per file, and one with times of exits."""
    lines = [f"{name}: {difference}" for name, difference in result.differences.items()]
    if result.times:
        exits = ", ".join(f"{name} {value:.3g} ms" for name, value in result.times.items() if name.startswith("exit"))
        share = result.times["early"] / result.times["full"]
        lines.append(
            f"onnxruntime, one sample, one thread, medians: full network {result.times['full']:.3g} ms, {exits}; with"
            f" exits {share:.0%} of the time of the full network"
        )
    return lines
