"""A SuperLink with TLS and one SuperNode with a key per site, on this machine."""

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

from examples.flower_deployment.credentials import make_authority, make_node_key, make_server_certificate
from fedekd.configuration.options import parts_of
from fedekd.data import FederatedDataModule
from fedekd.errors import UserError

#: The app that `flwr run` sends to the SuperLink.
APP = Path(__file__).parent / "app"

#: Name of the SuperLink in Flower's config.toml.
_CONNECTION = "rehearsal"


def write_site_data(data: FederatedDataModule, folder: Path) -> list[Path]:
    """Partition a data set and write one .npz file per site.

    Args:
        data: Data module, set up.
        folder: The files are FOLDER/site-K/images.npz.

    Returns:
        The paths of the files, one per site.
    """
    images, paths = data.samples, []
    for splits in data.clients:
        indices = np.sort(np.concatenate([part.numpy() for part in (splits.train, splits.validation, splits.test)]))
        pixels = images.inputs[torch.from_numpy(indices)].permute(0, 2, 3, 1).numpy()
        arrays = {
            "train_images": pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels,
            "train_labels": images.labels[indices].numpy()[:, None],
        }
        for split in ("val", "test"):  # MedMNIST's layout requires them; fedekd pools the three splits
            arrays |= {f"{split}_{name}": arrays[f"train_{name}"][:0] for name in ("images", "labels")}
        path = folder / f"site-{splits.client}" / "images.npz"
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, allow_pickle=False, **arrays)
        paths.append(path)
    return paths


@dataclass
class LocalDeployment:
    """SuperLink and SuperNodes as processes of this machine.

    Attributes:
        folder: Folder of all files: credentials, site folders, logs and the server's run.
        sites: Number of sites.
        port: Port of the SuperLink.
        processes: The started processes by name.
    """

    folder: Path
    sites: int
    port: int = field(default_factory=lambda: free_port())
    processes: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def address(self) -> str:
        """Return the address of the SuperLink."""
        return f"127.0.0.1:{self.port}"

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of the processes, with a separate Flower home."""
        programs = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
        return {
            **os.environ,
            "FLWR_HOME": str(self.folder / "flower"),
            "FLWR_TELEMETRY_ENABLED": "0",
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PATH": programs,
            "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        }

    def start(self) -> None:
        """Create the credentials, and start the SuperLink and one SuperNode per site."""
        keys = self.folder / "credentials"
        keys.mkdir(parents=True)
        make_server_certificate(keys, make_authority(keys))
        home = self.folder / "flower"
        home.mkdir()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "{_CONNECTION}"\n[superlink.{_CONNECTION}]\naddress = "{self.address}"\n'
            f'root-certificates = "{keys / "ca.pem"}"\n'
        )
        options = ["--ssl-ca-certfile", str(keys / "ca.pem"), "--ssl-certfile", str(keys / "server.pem")]
        options += ["--ssl-keyfile", str(keys / "server.key"), "--enable-supernode-auth", "--port", str(self.port)]
        self.launch("superlink", ["flower-superlink", *options, "--disable-runtime-dependency-installation"])
        for site in range(self.sites):
            make_node_key(keys, f"site-{site}")
            self._register(keys / f"site-{site}.pub")
            self.start_site(site)

    def start_site(self, site: int) -> None:
        """Start or restart the SuperNode of a site."""
        keys, site_folder = self.folder / "credentials", self.folder / f"site-{site}"
        # Without a name: the figures are compared with those of a partition, whose clients have numbers.
        node_config = f'number={site} name="" data="{site_folder / "images.npz"}" folder="{site_folder}"'
        options = ["--superlink", self.address, "--root-certificates", str(keys / "ca.pem")]
        options += ["--auth-supernode-private-key", str(keys / f"site-{site}"), "--node-config", node_config]
        self.launch(f"site-{site}", ["flower-supernode", *options, "--port", str(free_port())])

    def submit(self, options: Sequence[str], timeout: float = 0.0, secure: bool = False) -> int:
        """Start a federated run and return its id."""
        settings = {"options": shlex.join(options), "sites": self.sites, "folder": str(self.folder), "secure": secure}
        settings |= {"output": str(self.folder / "server"), "timeout": float(timeout)}
        run_config = " ".join(f"{name}={json.dumps(value)}" for name, value in settings.items())
        return int(self._flwr("run", str(APP), _CONNECTION, "--run-config", run_config)["run-id"])

    def wait(self, run_id: int, seconds: float) -> dict[str, Any]:
        """Wait for the end of a run and return its summary.

        Raises:
            UserError: The run fails or exceeds the time limit.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            [run] = self._flwr("list", _CONNECTION, "--run-id", str(run_id))["runs"]
            if str(run["status"]).startswith("finished"):
                self._save_server_log(run_id)
                path = self.folder / "server/summary.json"
                if run["status"] != "finished:completed" or not path.exists():
                    raise UserError(f"the run ended as {run['status']}. See {self.folder / 'server.log'}.")
                summary: dict[str, Any] = json.loads(path.read_text())
                return summary
            time.sleep(2)
        raise UserError(f"--seconds: the run did not end within {seconds:g} s. See the logs in {self.folder}.")

    def stop(self) -> None:
        """Terminate all processes, the SuperLink last."""
        for process in reversed(self.processes.values()):
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def launch(self, name: str, command: Sequence[str]) -> None:
        """Start a process whose output goes to FOLDER/NAME.log."""
        with (self.folder / f"{name}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, cwd=self.folder, env=self.environment
            )

    def _save_server_log(self, run_id: int) -> None:
        log = self._run_flwr("log", str(run_id), _CONNECTION, "--show")
        (self.folder / "server.log").write_text(log.stdout + log.stderr)

    def _register(self, public_key: Path) -> None:
        for attempt in range(60):
            try:
                self._flwr("supernode", "register", str(public_key), _CONNECTION)
            except UserError:
                if attempt == 59:
                    raise
                time.sleep(1)  # the SuperLink is not listening yet
            else:
                return

    def _flwr(self, *arguments: str) -> Any:
        done = self._run_flwr(*arguments, "--format", "json")
        try:
            reply = json.loads(done.stdout[done.stdout.index("{") :])
        except ValueError:
            reply = {}
        if done.returncode or not reply.get("success", False):
            output = " ".join((done.stdout + done.stderr).split())
            raise UserError(f"flwr {arguments[0]} failed: {output[-500:]}")
        return reply

    def _run_flwr(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["flwr", *arguments], capture_output=True, text=True, cwd=self.folder, env=self.environment, check=False
        )


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running_deployment(folder: Path, options: Sequence[str], sites: int) -> Iterator[LocalDeployment]:
    """Context manager: write the sites' data, start a deployment, stop it on exit."""
    write_site_data(parts_of(options)["data"], folder)
    deployment = LocalDeployment(folder, sites)
    try:
        deployment.start()
        yield deployment
    finally:
        deployment.stop()
