"""Run a federation of sites on this machine and compare it with a single process.

Separate processes with TLS and SuperNode keys, one folder per site, as between real hospitals: `make sites`. The exit
code is 0 if metrics.csv and the final proxy equal those of the single-process run bit for bit, and 1 if not. With
--secure true the updates are aggregated by SecAgg+, and the single-process run applies the same quantization.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from examples.flower_deployment.compare_runs import has_equal_metrics, has_equal_server_state
from examples.flower_deployment.deployment import running_deployment
from examples.flower_deployment.rounded_engine import RoundedEngine
from fedekd.configuration.options import parts_of
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.flower.secure.aggregation import require_num_sites
from fedekd.reporting import Display

#: Default of --options.
OPTIONS = ("--config", "digits.yaml", "--rounds", "2", "--client.local_epochs", "1", "--trainer.threads", "1")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the rehearsal; exit code 0 equal, 1 different or failed, 2 invalid input."""
    parser = ArgumentParser(prog="python -m examples.flower_deployment.rehearsal", description=__doc__)
    parser.add_argument("--folder", type=str, default="runs/sites", help="New folder for all files.")
    parser.add_argument("--sites", type=int, default=3, help="Number of sites.")
    parser.add_argument("--seconds", type=float, default=900.0, help="Time limit of the run.")
    parser.add_argument("--secure", type=bool, default=False, help="Use secure aggregation; needs at least 3 sites.")
    parser.add_argument("--options", type=str, default=" ".join(OPTIONS), help="Options of fit.")
    arguments = parser.parse_args(argv)
    folder = Path(arguments.folder).resolve()
    try:
        if folder.exists():
            raise UserError(f"--folder: expected a new folder, got {folder}. Remove it or choose another.")
        if arguments.secure:
            require_num_sites(arguments.sites)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    options = [*shlex.split(arguments.options), f"--data.num_clients={arguments.sites}", "--data.num_classes=10"]
    options.append("--logger=null")
    try:
        with running_deployment(folder, options, arguments.sites) as deployment:
            print(f"SuperLink at {deployment.address}, {arguments.sites} SuperNodes, TLS and keys; logs in {folder}")
            summary = deployment.wait(deployment.submit(options, secure=arguments.secure), arguments.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("single-process run for comparison:", flush=True)
    parts = parts_of(options)
    if arguments.secure:
        parts["engine"] = RoundedEngine
    with Display() as display:
        Orchestrator(**parts, output=folder / "single", baseline_dir=folder / "local", observer=display).run()
    print(f"Delta of {arguments.sites} sites: {summary['delta']}")
    return report(folder / "server", folder / "single")


def report(run: Path, other: Path) -> int:
    """Print whether two runs are equal and return the exit code."""
    metrics, proxy = has_equal_metrics(run, other), has_equal_server_state(run, other)
    print(f"metrics.csv: {'equal, byte for byte' if metrics else 'different'}")
    print(f"final proxy: {'equal, bit for bit' if proxy else 'different'}")
    return 0 if metrics and proxy else 1


if __name__ == "__main__":
    sys.exit(main())
