"""Lightning logger of one Weights & Biases run per federation. Slow to import."""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakSet

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only

from fedekd.atomic import atomic_file
from fedekd.errors import UserError, describe_error
from fedekd.reporting.rows import Summary, is_client_name, references_of
from fedekd.reporting.wandb_start import (
    ONLINE_MODES,
    choose_mode,
    own_run_id,
    remove_offline_runs,
    require_writable_folders,
    unreachable,
)

#: Loggers of this process with a run: `wandb.teardown` would end all of them.
_active: WeakSet[WandbRunLogger] = WeakSet()
_lock = threading.Lock()


class WandbRunLogger(WandbLogger):
    """WandbLogger of one run that spans many fits and may be resumed.

    `round` is the x axis of every metric, and a sweep may use any of them, such as `delta/avg`. Nothing is printed.

    The run is online with credentials and a server that answers, else offline in files that `wandb sync` uploads later.
    Its id is random, stored in the run folder, and unchanged after a resume. Weights & Biases cannot resume an offline
    run, and a killed process loses unwritten rows. A resumed offline run therefore starts again: its earlier folder is
    removed, and the `Tracker` replays the rounds. An online run continues after the last round on the server.

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
        log_checkpoints: Log a finished run as a `model` artifact: its configuration, results, figures and checkpoints.
        log_clients: Log the values of each client per round. False keeps their histogram and final table, and avoids
            W&B's limit of 10,000 names with more than about 250 clients.
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
        log_clients: bool = True,
    ) -> None:
        super().__init__(name=name, project=project or os.environ.get("WANDB_PROJECT", "fedekd"))
        self._save_dir = None if save_dir is None else os.fspath(save_dir)
        self._offline_wanted = offline
        self._log_checkpoints, self._log_clients = log_checkpoints, log_clients
        self._labels = {"entity": entity, "group": group, "job_type": job_type, "name": name, "tags": tags}
        self._run_dir: Path | None = None
        self._warn: Callable[[str], None] = warnings.warn
        self._owns_run = False

    def bind(self, run_dir: Path | None, warn: Callable[[str], None]) -> None:
        """Store the run id in `run_dir`, and the files unless `save_dir` is given."""
        self._run_dir, self._warn = run_dir, warn
        if self._save_dir is None and run_dir is not None:
            self._save_dir = os.fspath(run_dir)

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The `wandb.Run`: an active run of this process, or one started at first use."""
        if self._experiment is None:
            import wandb

            self._experiment = wandb.run if wandb.run is not None else self._start()
        return self._experiment

    @property
    def url(self) -> str | None:
        """Address of the run; None if it is offline or not started."""
        run = self._experiment
        return None if run is None or run.offline else run.url

    def _start(self) -> Any:
        save_dir = Path(self._save_dir or ".")
        save_dir.mkdir(parents=True, exist_ok=True)
        self._id = own_run_id(self._run_dir)
        if self._run_dir is not None:
            remove_offline_runs(save_dir, self._id)
        with _lock:
            _active.add(self)
        try:
            run = self._init(save_dir)
        except BaseException:
            _active.discard(self)
            raise
        # No summary="last": `delta/avg` would become {"last": x}, which a sweep does not find. No step_sync: a call
        # without `round` would get the last one, and that round would be logged twice.
        run.define_metric("*", step_metric="round", step_sync=False)
        self._owns_run = True
        if self._run_dir is not None and not run.offline and run.url:
            with atomic_file(self._run_dir / "wandb" / "url") as output:
                output.write(f"{run.url}\n".encode())
        return run

    def _init(self, save_dir: Path) -> Any:
        """Start a run; offline, after a warning, where it cannot be online."""
        import wandb

        # A sweep agent sets project and id through the environment; arguments would only cause a warning.
        arguments = {} if os.environ.get("WANDB_SWEEP_ID") else {"project": self._project, "id": self._id}
        # create_new: runs of other threads are not this one, and `wandb.run` stays the user's.
        settings = {"silent": True, "console": "off", "reinit": "create_new", "init_timeout": 30}
        arguments |= {**self._labels, "dir": os.fspath(save_dir), "resume": "allow"}
        if os.environ.get("WANDB_MODE") != "disabled":
            require_writable_folders()  # first: W&B's service starts with its settings
        mode, problem = choose_mode(self._offline_wanted), None
        try:
            problem = unreachable() if mode in ONLINE_MODES else None
            if problem is None:
                return wandb.init(**arguments, mode=mode, settings=wandb.Settings(**settings))
        except (wandb.errors.Error, ValueError) as error:
            problem = describe_error(error)
            self._teardown(1)  # its service holds the id of the run that failed
        try:
            run = wandb.init(**arguments, mode="offline", settings=wandb.Settings(**settings))
        except (wandb.errors.UsageError, ValueError) as error:  # offline, only an option can be the reason
            raise UserError(
                f"logger: expected options that W&B accepts, got an error: {describe_error(error)}"
            ) from error
        self._warn(
            f"logger: W&B is offline ({problem}). Upload the run later with `wandb sync {save_dir}/wandb/offline-run-*`"
        )
        return run

    def rounds_held(self) -> int:
        """Return the last round on the server of a resumed online run; 0 for a new run."""
        run = self.experiment
        if not (self._owns_run and run.resumed):
            return 0
        # W&B's step, which is the round, is of the rows; the summary may be older.
        return max(int(run.summary.get("round", 0)), int(run.step) - 1)

    @rank_zero_only
    def log_hyperparams(self, params: Any) -> None:
        """Log the nested configuration.

        A sweep locks its own names: an update would skip the whole of a nested one, such as `client`, with a warning.
        """
        if os.environ.get("WANDB_SWEEP_ID"):
            self.experiment.config.merge_locked(dict(params), _allow_val_change=True)
        else:
            super().log_hyperparams(params)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Log one row with the histogram of Delta over its clients.

        In a run that this logger started, the step is the round.
        """
        from fedekd.reporting.wandb_media import delta_histogram

        run, histogram = self.experiment, delta_histogram(metrics)
        values: dict[str, Any] = {
            name: value for name, value in metrics.items() if self._log_clients or not is_client_name(name)
        }
        if histogram is not None:
            values["delta/histogram"] = histogram
        # A run that was active before has its own steps, and drops rows of earlier ones.
        wandb_step = int(metrics["round"]) if self._owns_run and "round" in metrics else None
        run.log(values, step=wandb_step, commit=True)

    @rank_zero_only
    def log_summary(self, summary: Summary) -> None:
        """Log the summary of the run, then the table `clients` and its chart.

        A network with exits adds `budget_50/accuracy` and `budget_50/flops` per budget in percent; `do_no_harm` adds
        `deployed/delta/avg` and the other figures of the deployed models.
        """
        from fedekd.reporting.wandb_media import client_table, delta_chart

        metric = summary["metric"]
        scores = {f"{metric}/{name}": summary[name] for name in ("mean", "worst", "local_mean") if name in summary}
        deltas = {f"delta/{name}": value for name, value in summary["delta"].items()}
        references = references_of(summary)
        for score, difference, *_ in references:
            scores[f"{difference}/{score}_mean"] = summary[f"{score}_mean"]
            deltas |= {f"{difference}/{name}": value for name, value in summary[difference].items()}
        for other, values in summary.get("metrics", {}).items():
            figures = {f"{other}/{name}": values[name] for name in ("mean", "worst", "local_mean")}
            scores |= figures | {f"delta/{other}/{name}": value for name, value in values["delta"].items()}
        for line in summary.get("budgets", ()):
            name = f"budget_{round(100 * line['budget'])}"
            scores |= {f"{name}/accuracy": line["accuracy"], f"{name}/flops": line["cost"]}
        if "deployed" in summary:
            deployed = summary["deployed"]
            scores |= {f"deployed/{metric}/mean": deployed["mean"], "deployed/federated": deployed["federated"]}
            deltas |= {f"deployed/delta/{name}": value for name, value in deployed["delta"].items()}
        costs = {name: summary[name] for name in ("seconds", "bytes_up", "bytes_down") if name in summary}
        defined = {name: value for name, value in {**scores, **deltas, **costs}.items() if value is not None}
        run, table = self.experiment, client_table(summary)
        run.summary.update(defined)
        # Logged, not only in the summary: W&B opens panels for what has a history.
        run.log({"clients": table, "delta/by_client": delta_chart(table)})

    @rank_zero_only
    def log_artifacts(self, folder: Path, names: Sequence[str], metadata: Callable[[], Mapping[str, Any]]) -> None:
        """Log the run as a `model` artifact, if `log_checkpoints` is set.

        It is named `model-ID` and has the aliases `latest` and `round-R`. Downloaded, it is a run folder.
        """
        if not self._log_checkpoints:
            return
        import wandb

        values = dict(metadata())
        artifact = wandb.Artifact(f"model-{self.experiment.id}", type="model", metadata=values)
        for path in (folder / name for name in names):
            # The files of a finished run do not change: W&B need not copy them first.
            if path.is_dir():
                artifact.add_dir(os.fspath(path), name=path.name, policy="immutable")
            elif path.exists():
                artifact.add_file(os.fspath(path), policy="immutable")
        self.experiment.log_artifact(artifact, aliases=["latest", f"round-{values['rounds']}"])

    @rank_zero_only
    def finish(self, status: str) -> None:
        """End the run if this logger started it, as failed unless `success`."""
        if self._owns_run:
            run, self._owns_run = self.experiment, False
            run.finish(exit_code=0 if status == "success" else 1)
            _active.discard(self)
            if run.offline:
                self._teardown(0)  # an offline `finish` returns before the file is written; this waits for it

    def _teardown(self, exit_code: int) -> None:
        """End the service of W&B, unless another run uses it."""
        import wandb

        with _lock:
            if wandb.run is None and not set(_active) - {self}:
                wandb.teardown(exit_code=exit_code)
