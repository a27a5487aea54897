"""Lightning logger of one Weights & Biases run per federation. Slow to import."""

from __future__ import annotations

import netrc
import os
import re
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fedekd.atomic import atomic_file
from fedekd.errors import UserError
from fedekd.reporting.rows import Summary

#: Run ids that Weights & Biases accepts.
_RUN_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)


class WandbRunLogger(WandbLogger):
    """WandbLogger of one run that spans many fits and may be resumed.

    `round` is the x axis of every metric, and a sweep may use any of them, such as `delta/avg`. Nothing is printed.

    The run is online with credentials, else offline in files that `wandb sync` uploads later. Its id is random, stored
    in the run folder, and unchanged after a resume. Weights & Biases cannot resume an offline run, and a killed process
    loses unwritten rows. A resumed offline run therefore starts again: its earlier folder is removed, and the `Tracker`
    replays the rounds. An online run continues after the last round on the server.

    Args:
        project: Project; None is `WANDB_PROJECT` or `fedekd`. A sweep's project takes precedence.
        entity: Team or user; None is the default.
        group: Group of runs, such as one per experiment.
        job_type: Type of the run within its group.
        name: Display name; None is a random one.
        tags: Tags of the run.
        save_dir: Parent of the folder `wandb`; None is the run folder.
        offline: True stays offline, False goes online; None goes online with credentials: `WANDB_API_KEY`,
            `WANDB_IDENTITY_TOKEN_FILE` or an entry in the netrc file. `WANDB_MODE` takes precedence.
        log_checkpoints: Log the checkpoints of a finished run as an artifact.
    """

    def __init__(
        self,
        project: str | None = None,
        entity: str | None = None,
        group: str | None = None,
        job_type: str = "federation",
        name: str | None = None,
        tags: list[str] | None = None,
        save_dir: str | os.PathLike[str] | None = None,
        offline: bool | None = None,
        log_checkpoints: bool = False,
    ) -> None:
        super().__init__(name=name, project=project or os.environ.get("WANDB_PROJECT", "fedekd"))
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._offline_wanted = offline
        self._log_checkpoints = log_checkpoints
        self._labels = {"entity": entity, "group": group, "job_type": job_type, "name": name, "tags": tags}
        self._run_dir: Path | None = None
        self._owns_run = False

    def bind(self, run_dir: Path) -> None:
        """Store the run id in `run_dir`, and the files unless `save_dir` is given."""
        self._run_dir = run_dir
        if self._save_dir is None:
            self._save_dir = os.fspath(run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`: an active run of this process, or one started at first use."""
        if self._experiment is None:
            import wandb

            self._experiment = wandb.run if wandb.run is not None else self._start()
        return self._experiment

    def _start(self) -> Any:
        import wandb

        save_dir = Path(self._save_dir or ".")
        save_dir.mkdir(parents=True, exist_ok=True)
        self._id = _run_id(self._run_dir)
        if self._run_dir is not None:
            _remove_offline_runs(save_dir, self._id)
        # A sweep agent sets project and id through the environment; arguments would only cause a warning.
        identity = {} if os.environ.get("WANDB_SWEEP_ID") else {"project": self._project, "id": self._id}
        mode = _mode(self._offline_wanted)
        try:
            run = wandb.init(
                **identity,
                **self._labels,
                dir=os.fspath(save_dir),
                mode=mode,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"logger: Weights & Biases could not start a run (WANDB_MODE={mode}): {reason}. "
                "Log in with `wandb login`, or set WANDB_MODE=offline."
            ) from error
        # No summary="last": `delta/avg` would become {"last": x}, which a sweep does not find. No step_sync: a call
        # without `round` would get the last one, and that round would be logged twice.
        run.define_metric("*", step_metric="round", step_sync=False)
        self._owns_run = True
        return run

    def rounds_held(self) -> int:
        """Return the last round on the server of a resumed online run; 0 for a new run."""
        run = self.experiment
        if not (self._owns_run and run.resumed):
            return 0
        # W&B's step, which is the round, is of the rows; the summary may be older.
        return max(int(run.summary.get("round", 0)), int(run.step) - 1)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row; in a run that this logger started, the step is its round."""
        run = self.experiment
        # A run that was active before has its own steps, and drops rows of earlier ones.
        wandb_step = int(metrics["round"]) if self._owns_run and "round" in metrics else None
        run.log(dict(metrics), step=wandb_step, commit=True)

    @rank_zero_only
    def log_summary(self, summary: Summary) -> None:
        """Log scores, Delta, costs and the table `clients` as the summary of the run.

        A network with exits adds `budget_50/accuracy` and `budget_50/flops` per budget in percent; `do_no_harm` adds
        `deployed/delta/avg` and the other figures of the deployed models.
        """
        import wandb

        metric = summary["metric"]
        scores = {f"{metric}/{name}": summary[name] for name in ("mean", "worst", "local_mean") if name in summary}
        deltas = {f"delta/{name}": value for name, value in summary["delta"].items()}
        for line in summary.get("budgets", ()):
            name = f"budget_{round(100 * line['budget'])}"
            scores |= {f"{name}/accuracy": line["accuracy"], f"{name}/flops": line["cost"]}
        if "deployed" in summary:
            deployed = summary["deployed"]
            scores |= {f"deployed/{metric}/mean": deployed["mean"], "deployed/federated": deployed["federated"]}
            deltas |= {f"deployed/delta/{name}": value for name, value in deployed["delta"].items()}
        costs = {name: summary[name] for name in ("seconds", "bytes_up", "bytes_down") if name in summary}
        names = ["client", "train", "test", "local", "score", "delta"]
        table = wandb.Table(columns=names, data=[[client[name] for name in names] for client in summary["clients"]])
        self.experiment.summary.update({**scores, **deltas, **costs, "clients": table})

    @rank_zero_only
    def log_artifacts(self, folder: Path) -> None:
        """Log the checkpoints as a `model` artifact, if `log_checkpoints` is set."""
        if self._log_checkpoints:
            import wandb

            artifact = wandb.Artifact(f"checkpoints-{self.experiment.id}", type="model")
            # The checkpoints of a finished run do not change: W&B need not copy them first.
            artifact.add_dir(os.fspath(folder), policy="immutable")
            self.experiment.log_artifact(artifact)

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run if this logger started it, as failed unless `success`."""
        if self._owns_run:
            import wandb

            run, self._owns_run = self.experiment, False
            run.finish(exit_code=0 if status == "success" else 1)
            if run.offline and wandb.run is None:
                # An offline `finish` returns before the file is written; this waits for it.
                wandb.teardown(exit_code=0)


def _run_id(run_dir: Path | None) -> str:
    """Return the run id from the environment or the run folder, or draw one.

    It does not depend on the seed: two equal federations are two runs. A damaged file counts as missing.
    """
    file = None if run_dir is None else run_dir / "wandb" / "run-id"
    given = os.environ.get("WANDB_RUN_ID")
    if not given and file is not None and file.is_file():
        stored = file.read_bytes().decode(errors="replace").strip()
        if _RUN_ID.fullmatch(stored):
            return stored
    run_id = given or secrets.token_hex(4)
    if file is not None:
        with atomic_file(file) as output:
            output.write(f"{run_id}\n".encode())
    return run_id


def _remove_offline_runs(save_dir: Path, run_id: str) -> None:
    """Remove offline folders of this run, whose rounds will be replayed."""
    pattern = re.compile(rf"offline-run-\d+_\d+-{re.escape(run_id)}(-\d+)?")
    for folder in [*save_dir.glob("wandb/offline-run-*"), *save_dir.glob(".wandb/offline-run-*")]:
        if pattern.fullmatch(folder.name):
            # First the file that `wandb sync` reads: the service of a killed process may still write other files.
            (folder / f"run-{run_id}.wandb").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _mode(offline: bool | None) -> str | None:
    """Return the mode for `wandb.init`; None uses the settings of W&B."""
    if mode := os.environ.get("WANDB_MODE"):
        return mode
    if offline is None:
        return None if _logged_in() else "offline"
    return "offline" if offline else "online"


def _logged_in() -> bool:
    import wandb

    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(wandb.setup().settings.base_url).netloc
    given = os.environ.get("NETRC")
    for file in [Path(given)] if given else [Path.home() / ".netrc", Path.home() / "_netrc"]:
        try:
            if netrc.netrc(file.expanduser()).authenticators(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
