"""Reporting: what becomes of a run's numbers: logs, a live display, tables and figures.

`WandbRunLogger` lies in `fedekd.reporting.wandb_logger`, which loads Lightning and Weights & Biases; nothing
here does.
"""

from fedekd.reporting import figures
from fedekd.reporting.console import Display, client_table, deployed_table, result_tables
from fedekd.reporting.tracking import FederationLogger, Tracker, read_metrics_csv, write_metrics_csv

__all__ = [
    "Display",
    "FederationLogger",
    "Tracker",
    "client_table",
    "deployed_table",
    "figures",
    "read_metrics_csv",
    "result_tables",
    "write_metrics_csv",
]
