"""One Weights & Biases run for a whole federation, through kills and resumes. Slow to import."""

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


class WandbRunLogger(WandbLogger):
    """Lightning's WandbLogger, made for one run that spans many fits and may be stopped and resumed.

    Every metric is drawn over `round_idx`, and a sweep may name any of them, `delta/avg` say. Nothing is printed.

    The run is online if someone is logged in, else offline, in files that `wandb sync` uploads later. Its id
    is random, kept in the run's folder, and the same after a resume. Weights & Biases cannot resume an
    offline run, and a killed process loses what was not written yet: so an offline run begins anew at a
    resume, its former folder is removed, and the `Tracker` replays the rounds. An online run goes on after
    the last round that the server holds.

    Args:
        project: The project; None for `WANDB_PROJECT`, else `fedekd`. A sweep's own project comes first.
        entity: The team or user; None for the default.
        group: The group of runs, such as one per experiment.
        job_type: What kind of run it is within the group.
        name: The run's display name; None for a random one.
        tags: Tags of the run.
        save_dir: Where the folder `wandb` is made; None for the run's folder.
        offline: Whether to stay offline; None to be online exactly if there are credentials: `WANDB_API_KEY`,
            `WANDB_IDENTITY_TOKEN_FILE` or an entry in the netrc file. Where `WANDB_MODE` is set, it decides.
        log_checkpoints: Keep the checkpoints of a finished run as an artifact.
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
        """Keep the run's id in `run_dir`, and, unless `save_dir` was given, its files too."""
        self._run_dir = run_dir
        if self._save_dir is None:
            self._save_dir = os.fspath(run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`, begun at first use; one that is active in this process is taken as it is."""
        if self._experiment is None:
            import wandb

            self._experiment = wandb.run if wandb.run is not None else self._begin()
        return self._experiment

    def _begin(self) -> Any:
        import wandb

        save_dir = Path(self._save_dir or ".")
        save_dir.mkdir(parents=True, exist_ok=True)
        self._id = _run_id(self._run_dir)
        if self._run_dir is not None:
            _remove_offline_runs(save_dir, self._id)
        # A sweep agent settles project and id through the environment; a second opinion only earns a warning.
        place = {} if os.environ.get("WANDB_SWEEP_ID") else {"project": self._project, "id": self._id}
        mode = _mode(self._offline_wanted)
        try:
            run = wandb.init(
                **place,
                **self._labels,
                dir=os.fspath(save_dir),
                mode=mode,
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.errors.Error as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"Weights & Biases refused to begin a run (WANDB_MODE={mode}): {reason}; "
                "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error
        # Not summary="last": the summary's `delta/avg` would become {"last": x}, which no sweep finds. Not
        # step_sync: a call that has no `round` would be given the last one, and that round be there twice.
        run.define_metric("*", step_metric="round", step_sync=False)
        self._owns_run = True
        return run

    def rounds_held(self) -> int:
        """The last round on the server, if this is an online run that goes on; 0 for a new one."""
        run = self.experiment
        if not (self._owns_run and run.resumed):
            return 0
        # W&B's step is the round, and counts from the rows themselves, where the summary may lag behind.
        return max(int(run.summary.get("round", 0)), int(run.step) - 1)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row at once. In a run of its own, W&B's step is the row's `round_idx`."""
        run = self.experiment
        # A run that was active before has steps of its own, and drops rows whose step lies behind them.
        w_and_b_step = int(metrics["round"]) if self._owns_run and "round" in metrics else None
        run.log(dict(metrics), step=w_and_b_step, commit=True)

    @rank_zero_only
    def log_summary(self, summary: Summary) -> None:
        """Put the final scores, Deltas and costs, and the table `clients`, into the run's summary.

        Of a network with exits also `budget_50/accuracy` and `budget_50/flops`, for each budget in percent;
        with `do_no_harm` also `deployed/delta/avg` and the like: what is left where clients keep what harms them not.
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
        """Keep the checkpoints in `folder` as an artifact of type `model`, if `log_checkpoints` was given."""
        if self._log_checkpoints:
            import wandb

            artifact = wandb.Artifact(f"checkpoints-{self.experiment.id}", type="model")
            # A finished run's checkpoints no longer change, so they need not be copied first.
            artifact.add_dir(os.fspath(folder), policy="immutable")
            self.experiment.log_artifact(artifact)

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run, if this logger began it; any status but `success` marks it as failed."""
        if self._owns_run:
            import wandb

            run, self._owns_run = self.experiment, False
            run.finish(exit_code=0 if status == "success" else 1)
            if run.offline and wandb.run is None:
                # An offline `finish` returns before W&B's service has written the file; this waits for it.
                wandb.teardown(exit_code=0)


def _run_id(run_dir: Path | None) -> str:
    """The id of the federation's run: the environment's, or the one in the run's folder, or a new one.

    A new one is drawn from the system, never from the seed: two equal federations are two runs.
    """
    file = None if run_dir is None else run_dir / "wandb" / "run-id"
    given = os.environ.get("WANDB_RUN_ID")
    if not given and file is not None and file.exists():
        return file.read_text().strip()
    run_id = given or secrets.token_hex(4)
    if file is not None:
        with atomic_file(file) as output:
            output.write(f"{run_id}\n".encode())
    return run_id


def _remove_offline_runs(save_dir: Path, run_id: str) -> None:
    """Remove what earlier processes left of this very run: all of its rounds are about to be replayed."""
    own = re.compile(rf"offline-run-\d+_\d+-{re.escape(run_id)}(-\d+)?")
    for folder in [*save_dir.glob("wandb/offline-run-*"), *save_dir.glob(".wandb/offline-run-*")]:
        if own.fullmatch(folder.name):
            # First what `wandb sync` reads: a killed process's service may still be writing beside it.
            (folder / f"run-{run_id}.wandb").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)


def _mode(offline: bool | None) -> str | None:
    """The mode for `wandb.init`; None leaves it to W&B's own settings (`wandb offline`, say)."""
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
