"""Reporting of a run: loggers, live display, tables and figures.

`WandbRunLogger` is in `fedekd.reporting.wandb_logger`, which imports Lightning and Weights & Biases; this package does
not.
"""

from fedekd.reporting import figures
from fedekd.reporting.console import Display, client_table, deployed_table, result_tables
from fedekd.reporting.tracking import FederationLogger, Tracker, metrics_csv, read_metrics_csv, write_metrics_csv

__all__ = [
    "Display",
    "FederationLogger",
    "Tracker",
    "client_table",
    "deployed_table",
    "figures",
    "metrics_csv",
    "read_metrics_csv",
    "result_tables",
    "write_metrics_csv",
]
