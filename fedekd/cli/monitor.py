"""`monitor`: follow the guarantees of a deployed model on new samples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser, Namespace

from fedekd.atomic import atomic_file, digest, remove_drafts
from fedekd.cli.arguments import add_client_argument, add_trained_arguments, select_client
from fedekd.cli.folder_lock import lock_folder
from fedekd.cli.monitor_output import alarm_message, alarm_table, draw_evidence
from fedekd.configuration.help import BriefHelp
from fedekd.configuration.options import parse
from fedekd.configuration.trained import Trained, open_trained, require_one_source, site_folder, state_digest
from fedekd.data import take_inputs
from fedekd.early_exit.client_calibration import independent_indices, input_digests, require_unused_validation
from fedekd.early_exit.fingerprint import network_fingerprint
from fedekd.early_exit.policy import ExitPolicy
from fedekd.early_exit.policy_files import load_other_samples, load_policy, policy_path
from fedekd.errors import UserError, print_warning, require, shorten_path
from fedekd.methods import Client
from fedekd.methods.serving import LOCAL
from fedekd.models import MultiExitNetwork
from fedekd.monitoring import (
    Arrivals,
    Followed,
    MonitoredColumns,
    MonitorStart,
    MonitorState,
    Quantity,
    close_exits,
    follow,
    open_alarms,
    read_arrivals,
)
from fedekd.monitoring.arrivals import read_header
from fedekd.monitoring.cells import TARGET
from fedekd.monitoring.policies import exit_limits, policy_settings
from fedekd.monitoring.start import SAMPLE_DIGITS
from fedekd.reporting.console import PlainConsole

#: Exit code of an alarm; 2 is invalid input.
ALARM = 3

#: Confidence of a new monitor without --confidence.
CONFIDENCE = 0.9

#: Splits whose samples a monitor refuses: the network, its policy or its choice depend on them.
_USED_SPLITS = ("train", "tuning", "calibration", "holdout")


def monitor_parser() -> ArgumentParser:
    """Create the parser of `monitor`."""
    parser = ArgumentParser(
        prog="orchestrator.py monitor",
        usage="%(prog)s RUN | --site FOLDER --arrivals FILE [--client K] [--confidence 0.9] [--apply true]",
        description="Follow the guarantees of a deployed model on the samples of a CSV file that grows: error rates of"
        " exits, do-no-harm and coverage where the file has a column target, drift tests otherwise. The exit code is 0"
        " without an open alarm, 3 with one, and 2 for invalid input. A later call goes on with the new rows.",
        formatter_class=BriefHelp,
        allow_abbrev=False,
        exit_on_error=False,
    )
    add_trained_arguments(parser)
    add_client_argument(parser)
    parser.add_argument(
        "--arrivals",
        type=str,
        default="",
        help="CSV file of `predict --monitoring true`, to which rows are appended; with a column target for labels.",
    )
    parser.add_argument(
        "--state",
        type=str | None,
        default=None,
        help="Folder of settings, state and plot (default: the arrivals' name with the suffix .monitor).",
    )
    parser.add_argument(
        "--confidence",
        type=float | None,
        default=None,
        help=f"Probability of no false alarm, ever, in (0, 1); set by the first call (default {CONFIDENCE}).",
    )
    parser.add_argument(
        "--coverage",
        type=float | None,
        default=None,
        help="Also follow the coverage of prediction sets (column set) or intervals (columns lower and upper): its"
        " smallest allowed value, in (0, 1); set by the first call.",
    )
    parser.add_argument(
        "--apply",
        type=bool,
        nargs="?",
        const=True,
        default=False,
        help="After an alarm, write a policy with the exit closed; the old policy is kept.",
    )
    return parser


def run(argv: Sequence[str]) -> int:
    """Run `monitor RUN`; returns 0 without an open alarm and 3 with one."""
    config = parse(monitor_parser(), argv)
    require_one_source("monitor", config.run, config.site)
    for option in ("confidence", "coverage"):
        value = getattr(config, option)
        require(value is None or 0 < value < 1, f"--{option}", "a number in (0, 1)", value)
    if not config.arrivals:
        raise UserError("--arrivals: expected a CSV file, got none. Example: monitor runs/NAME --arrivals arrivals.csv")
    path = Path(config.arrivals).expanduser()
    header = read_header(path)
    folder = _state_folder(config.state, path)
    start, run_folder = _start(config, folder / "start.json", header)
    if start.is_labelled != (TARGET in header):
        expected = "a column target as at the start" if start.is_labelled else "no column target as at the start"
        raise UserError(
            f"--arrivals: expected {expected}, got {shorten_path(path)} {'without' if start.is_labelled else 'with'}"
            " one. Use another --state"
        )
    policy = load_policy(run_folder, start.client)
    start.require_policy(policy)
    before = MonitorState.load(folder / "state.json").consumed
    arrivals = read_arrivals(path, start, before.size, before.sha256)
    followed = follow(start, arrivals)
    _store(folder, start, arrivals, followed)  # invalid arrivals of a first call fix nothing
    console = PlainConsole()
    console.print(alarm_table(start, followed, policy))
    new = arrivals.rows - before.rows
    console.print(f"{arrivals.rows} arrivals, {new} of them new; {folder}", soft_wrap=True)
    alarms = open_alarms(followed, policy)
    if alarms and config.apply and policy is not None:
        policy = _apply(start, alarms, run_folder, console)
    for alarm in alarms:
        console.print(alarm_message(start, alarm, policy), soft_wrap=True)
    return ALARM if alarms else 0


def _state_folder(state: str | None, arrivals: Path) -> Path:
    """Return the folder of the monitor.

    Raises:
        UserError: It is empty, or a file.
    """
    require(state != "", "--state", "a folder", state, "Omit it for the arrivals' name with the suffix .monitor")
    folder = arrivals.with_suffix(".monitor") if state is None else Path(state).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--state: expected a folder, got the file {shorten_path(folder)}. Name another")
    return folder


def _store(folder: Path, start: MonitorStart, arrivals: Arrivals, followed: Sequence[Followed]) -> None:
    """Write settings, plot and state; a call that has read more rows keeps its state.

    Raises:
        UserError: Another first call has fixed other settings.
    """
    with lock_folder(folder):
        remove_drafts(folder, min_age=3600.0)
        path = folder / "start.json"
        if not path.is_file():
            start.save(path)
        elif MonitorStart.load(path) != start:
            raise UserError(
                f"--state: expected the settings of this call, got others of another call in {shorten_path(folder)}."
                " Repeat the command"
            )
        if MonitorState.load(folder / "state.json").consumed.size > arrivals.size:
            return
        # The plot comes first: a process that is killed in between draws it again.
        draw_evidence(start, followed, folder / "evidence.png")
        MonitorState.of(arrivals, followed).save(folder / "state.json")


def _start(config: Namespace, path: Path, header: Sequence[str]) -> tuple[MonitorStart, Path]:
    """Return the settings of the monitor, and the folder of the policies.

    The run is opened by the first call only.
    """
    if not path.is_file():
        trained = open_trained("monitor", config.run, config.site)
        return _new_start(trained, select_client(trained, config.client), config, TARGET in header), trained.folder
    start = MonitorStart.load(path)
    if config.client is not None:
        is_same = config.client in (str(start.client), start.name)
        require(is_same, "--client", f"{start.name or start.client} as at the start", config.client)
    if config.confidence is not None:
        is_same, hint = config.confidence == start.confidence, "Start a new monitor with another --state"
        require(is_same, "--confidence", f"{start.confidence} as at the start", config.confidence, hint)
    covered = next((round(1 - each.limit, 12) for each in start.quantities if each.kind == "coverage"), None)
    if config.coverage is not None:
        hint = "Start a new monitor with another --state"
        require(config.coverage == covered, "--coverage", f"{covered} as at the start", config.coverage, hint)
    folder = Path(config.run) if config.site is None else site_folder("monitor", Path(config.site))
    found = state_digest(folder, start.client)
    if found is None or found != (start.run or found):
        name = "RUN" if config.site is None else "--site"
        got = "which has no training" if found is None else "another one"
        raise UserError(
            f"monitor: {name}: expected the training of the start of the monitor, got {shorten_path(folder)}, {got}."
            " Give that of the start, or start a new monitor with another --state"
        )
    return start, folder


def _new_start(trained: Trained, client: Client, config: Namespace, is_labelled: bool) -> MonitorStart:
    """Fix what a new monitor follows."""
    if client.samples.group is not None:
        print_warning(
            f"samples of {client.splits.label} have groups, such as patients: append one row per group, drawn at"
            " random. With several, an alarm does not contradict the guarantee"
        )
    network, policy = client.deployed_model, trained.policy(client)
    if policy is not None and isinstance(network, MultiExitNetwork):
        policy.require(network, client.networks.get("proxy"))
    if not is_labelled and config.coverage is not None:
        raise UserError("--coverage: expected arrivals with a column target, got none. Append the true labels")
    splits, inputs, rule = client.splits, client.samples.inputs, trained.do_no_harm
    others = load_other_samples(trained.folder, client.number)
    reference: Mapping[str, Sequence[float]] = {}
    if is_labelled:
        quantities = [] if policy is None else _exits(policy)
        if rule is not None and client.deployed_role != LOCAL:
            if rule.compares_samples:
                quantities.append(Quantity("do_no_harm", "do_no_harm", rule.margin))
            else:
                print_warning(f"do no harm is followed in accuracy only: this run compared {rule.metric}")
        if config.coverage is not None:
            quantities.append(Quantity("coverage", "coverage", round(1 - config.coverage, 12)))
        if not quantities:
            raise UserError(
                f"monitor: expected open exits, do_no_harm or --coverage to follow, got none of {splits.label}."
                f" Calibrate its exits: calibrate {trained.argument}; or follow arrivals without labels"
            )
    else:
        if others is None:
            require_unused_validation(client, "Follow arrivals with a column target")
        reference = _reference(client) if others is None else others.drift
        quantities = [Quantity("drift", name) for name in reference]
    used = [
        each
        for name in _USED_SPLITS
        for each in input_digests(take_inputs(inputs, getattr(splits, name).to(inputs.device)))
    ]
    used += [] if others is None else others.hashes
    return MonitorStart(
        task=client.spec.task,
        client=client.number,
        name=splits.name or "",
        network=network_fingerprint(network),
        run=state_digest(trained.folder, client.number) or "",
        is_labelled=is_labelled,
        quantities=tuple(quantities),
        confidence=CONFIDENCE if config.confidence is None else config.confidence,
        policy=None if policy is None else policy_settings(policy),
        limits=() if policy is None else exit_limits(policy),
        class_names=() if client.spec.task == "regression" else tuple(client.samples.class_names),
        clip=1.0 if rule is None or client.spec.task != "regression" else rule.clip,
        reference={name: tuple(values) for name, values in reference.items()},
        used=frozenset(each[:SAMPLE_DIGITS] for each in used),
        seed=client.spec.seed,
    )


def _exits(policy: ExitPolicy) -> list[Quantity]:
    """Return the open exits, with their target risk."""
    if policy.has_no_guarantee:
        print_warning(f"the policy was calibrated with mode {policy.mode}, which has no guarantee")
    return [
        Quantity("exit", f"exit {e + 1}", policy.target_risk, e + 1)
        for e, is_open in enumerate(policy.open_exits)
        if is_open
    ]


def _reference(client: Client) -> dict[str, list[float]]:
    """Return the drift columns of the calibration split, one sample per group."""
    inputs = client.samples.inputs
    values = MonitoredColumns(client).drift_values(
        take_inputs(inputs, independent_indices(client, "calibration").to(inputs.device))
    )
    if not values:
        raise UserError(
            f"monitor: expected calibration samples of {client.splits.label} as a reference, got none. Change"
            " data.fractions or data.min_samples"
        )
    return values


def _apply(
    start: MonitorStart, alarms: Sequence[Followed], run_folder: Path, console: PlainConsole
) -> ExitPolicy | None:
    """Write the policy with closed exits, and a copy of the old one before."""
    path = policy_path(run_folder, start.client)
    with lock_folder(path.parent):
        policy = load_policy(run_folder, start.client)  # another monitor may have closed an exit
        start.require_policy(policy)
        if policy is None or (changed := close_exits(policy, alarms)) == policy:
            return policy
        content = path.read_bytes()
        copy = path.with_name(f"{path.stem}.before-{digest(content)[:8]}.json")
        with atomic_file(copy) as file:
            file.write(content)
        changed.save(path)
    console.print(f"written to {path}; the old policy is {copy}", soft_wrap=True)
    return changed
