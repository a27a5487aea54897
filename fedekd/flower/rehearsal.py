"""A federation of sites rehearsed on one machine: separate processes, TLS, keys, and a folder of its own for each site.

`make sites`, or `python -m fedekd.flower.rehearsal`. It ends by holding the result against the same federation in one
process: the same figures, to the last bit. With `--secure true` the server learns the mean of the updates alone; the
one process then rounds them to the grid on which they are masked.
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser

from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule
from fedekd.errors import UserError
from fedekd.federation import Orchestrator
from fedekd.federation.checkpoint import CheckpointStore
from fedekd.flower.credentials import make_authority, make_node_key, make_server_certificate
from fedekd.flower.rounded_engine import RoundedEngine
from fedekd.flower.secure import require_sites
from fedekd.reporting import Display

#: What is rehearsed, unless options are given.
OPTIONS = ("--config", "digits.yaml", "--rounds", "2", "--client.local_epochs", "1", "--trainer.threads", "1")

#: The app that `flwr run` sends out.
APP = Path(__file__).parent / "app"


def write_site_data(data: FederatedDataModule, folder: Path) -> list[Path]:
    """Deal a data set, and write each site's part as its own .npz file, as if it had never been anywhere else."""
    images, paths = data.images, []
    for splits in data.clients:
        own = np.sort(np.concatenate([part.numpy() for part in (splits.train, splits.validation, splits.test)]))
        pixels = images.pixels[own].permute(0, 2, 3, 1).numpy()
        arrays = {"train_images": pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels}
        arrays["train_labels"] = images.labels[own].numpy()[:, None]
        for split in ("val", "test"):  # MedMNIST's layout has them; all splits are pooled
            arrays |= {f"{split}_{name}": arrays[f"train_{name}"][:0] for name in ("images", "labels")}
        site = folder / f"site-{splits.client}"
        site.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(site / "images.npz", allow_pickle=False, **arrays)
        paths.append(site / "images.npz")
    return paths


@dataclass
class Rehearsal:
    """The processes of a federation of sites on this machine.

    Attributes:
        folder: Of everything it writes: credentials, sites, logs, the server's run.
        sites: How many sites there are.
        port: Of the SuperLink.
        processes: By name, what was started.
    """

    folder: Path
    sites: int
    port: int = field(default_factory=lambda: free_port())
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Of every process: Flower's own folder, no telemetry, and this Python's programs first."""
        own = {"FLWR_HOME": str(self.folder / "flower"), "FLWR_TELEMETRY_ENABLED": "0"}
        paths = os.pathsep.join(path for path in sys.path if path)
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {**os.environ, **own, "PYTHONPATH": paths, "PATH": programs, "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}

    def start(self) -> None:
        """Make credentials, and start the SuperLink and a SuperNode for each site."""
        keys = self.folder / "credentials"
        keys.mkdir(parents=True)
        make_server_certificate(keys, make_authority(keys))
        home = self.folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "rehearsal"\n[superlink.rehearsal]\naddress = "{self.address}"\n'
            f'root-certificates = "{keys / "ca.pem"}"\n'
        )
        tls = ["--ssl-ca-certfile", "ca.pem", "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"]
        options = [str(keys / part) if part.endswith((".pem", ".key")) else part for part in tls]
        options += ["--enable-supernode-auth", "--port", str(self.port), "--disable-runtime-dependency-installation"]
        self._launch("superlink", ["flower-superlink", *options])
        for site in range(self.sites):
            make_node_key(keys, f"site-{site}")
            self._register(keys / f"site-{site}.pub")
            self.start_site(site)

    def start_site(self, site: int) -> None:
        """Start a site's SuperNode, or start it again."""
        keys, own = self.folder / "credentials", self.folder / f"site-{site}"
        node = f'number={site} data="{own / "images.npz"}" folder="{own}"'
        options = ["--superlink", self.address, "--root-certificates", str(keys / "ca.pem")]
        options += ["--auth-supernode-private-key", str(keys / f"site-{site}"), "--node-config", node]
        self._launch(f"site-{site}", ["flower-supernode", *options, "--port", str(free_port())])

    def submit(self, options: Sequence[str], timeout: float = 0.0, secure: bool = False) -> int:
        """Start a run of the app; its number."""
        settings = {"options": shlex.join(options), "sites": self.sites, "folder": str(self.folder), "secure": secure}
        settings |= {"output": str(self.folder / "server"), "timeout": float(timeout)}
        told = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        reply = self._flwr("run", str(APP), "rehearsal", "--run-config", told, "--format", "json")
        return int(reply["run-id"])

    def wait(self, run: int, seconds: float) -> dict[str, Any]:
        """The summary of a run, once it is finished.

        Raises:
            UserError: If it has failed, or takes longer.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            [line] = self._flwr("list", "rehearsal", "--run-id", str(run), "--format", "json")["runs"]
            if str(line["status"]).startswith("finished"):
                self._keep_log(run)
                summary = self.folder / "server/summary.json"
                if line["status"] != "finished:completed" or not summary.exists():
                    raise UserError(f"the run has ended as {line['status']}; {self.folder / 'server.log'} says why")
                found: dict[str, Any] = json.loads(summary.read_text())
                return found
            time.sleep(2)
        raise UserError(f"the run has not ended within {seconds:g} s; {self.folder} has the logs")

    def stop(self) -> None:
        """End all processes, sites first."""
        for name in sorted(self.processes):
            self.processes[name].terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _keep_log(self, run: int) -> None:
        """Write what the server's app has said, which Flower keeps, to server.log."""
        done = subprocess.run(
            ["flwr", "log", str(run), "rehearsal", "--show"],
            capture_output=True,
            text=True,
            cwd=self.folder,
            env=self.environment,
            check=False,
        )
        (self.folder / "server.log").write_text(done.stdout + done.stderr)

    def _register(self, key: Path) -> None:
        for _ in range(60):  # until the SuperLink listens
            try:
                self._flwr("supernode", "register", str(key), "rehearsal", "--format", "json")
            except UserError as error:
                reason = error
                time.sleep(1)
            else:
                return
        raise reason

    def _launch(self, name: str, command: Sequence[str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env=self.environment
            )

    def _flwr(self, *arguments: str) -> Any:
        done = subprocess.run(
            ["flwr", *arguments], capture_output=True, text=True, cwd=self.folder, env=self.environment, check=False
        )
        try:
            reply = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            reply = {}
        if done.returncode or not reply.get("success", False):
            told = " ".join((done.stdout + done.stderr).split())
            raise UserError(f"flwr {arguments[0]} has failed: {told[-500:]}")
        return reply


def free_port() -> int:
    """A port of the loopback on which nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def rehearsed(folder: Path, options: Sequence[str], sites: int) -> Iterator[Rehearsal]:
    """A running federation of sites, each with its part of the data set in a folder of its own; ended at the end."""
    write_site_data(parts_of(options)["data"], folder)
    rehearsal = Rehearsal(folder, sites)
    try:
        rehearsal.start()
        yield rehearsal
    finally:
        rehearsal.stop()


def main(argv: Sequence[str] | None = None) -> int:
    """Rehearse, compare, and tell; the exit code is 1 if any figure differs."""
    parser = ArgumentParser(prog="python -m fedekd.flower.rehearsal", description=__doc__)
    parser.add_argument("--folder", type=str, default="runs/sites", help="Of all that is written; must not be there.")
    parser.add_argument("--sites", type=int, default=3, help="How many.")
    parser.add_argument("--seconds", type=float, default=900.0, help="How long the federation may take.")
    parser.add_argument("--secure", type=bool, default=False, help="Whether updates are hidden among each other.")
    parser.add_argument("--options", type=str, default=" ".join(OPTIONS), help="As those of fit.")
    config = parser.parse_args(argv)
    folder = Path(config.folder).resolve()
    if folder.exists():
        print(f"error: --folder {folder} exists already; remove it, or choose another", file=sys.stderr)
        return 2
    try:
        if config.secure:
            require_sites(config.sites)
    except UserError as error:
        print(f"error: --sites {config.sites}: {error}", file=sys.stderr)
        return 2
    folder.mkdir(parents=True)
    options = [
        *shlex.split(config.options),
        f"--data.num_clients={config.sites}",
        "--data.num_classes=10",
        "--logger=null",
    ]
    try:
        with rehearsed(folder, options, config.sites) as rehearsal:
            print(
                f"a SuperLink at {rehearsal.address} and {config.sites} SuperNodes, with TLS and keys; logs in {folder}"
            )
            summary = rehearsal.wait(rehearsal.submit(options, secure=config.secure), config.seconds)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("the same in one process:", flush=True)
    parts = parts_of(options)
    if config.secure:
        parts["engine"] = RoundedEngine
    with Display() as display:
        Orchestrator(
            **parts,
            output=folder / "one-process",
            baseline_dir=folder / "local",
            observer=display,
        ).run()
    print(f"Delta of {config.sites} sites: {summary['delta']}")
    runs = folder / "server", folder / "one-process"
    same = [same_figures(*runs), same_proxy(*runs)]
    print("every figure of every round is the same" if same[0] else "the figures differ")
    print("the last proxy is the same, bit for bit" if same[1] else "the last proxies differ")
    return 0 if all(same) else 1


def same_figures(one: Path, other: Path) -> bool:
    """Whether two runs have the same metrics.csv, byte for byte."""
    return (one / "metrics.csv").read_bytes() == (other / "metrics.csv").read_bytes()


def same_proxy(one: Path, other: Path) -> bool:
    """Whether two runs ended with the same server state, value for value; how it lies in memory may differ."""
    states = [last_proxy(run) for run in (one, other)]
    if not states[0] or states[0].keys() != states[1].keys():
        return False
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def last_proxy(run: Path) -> dict[str, Any]:
    """The server's state at the end of a run; empty if it has none."""
    checkpoint, _ = CheckpointStore(run / "checkpoints").load()
    return {} if checkpoint is None else dict(checkpoint.server)


if __name__ == "__main__":
    sys.exit(main())
