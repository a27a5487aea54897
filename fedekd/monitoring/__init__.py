"""Guarantees after deployment: alarms from labelled and unlabelled arrivals."""

from fedekd.monitoring.arrivals import Arrivals, read_arrivals
from fedekd.monitoring.columns import MonitoredColumns
from fedekd.monitoring.evidence import Followed, follow
from fedekd.monitoring.start import MonitorStart, Quantity
from fedekd.monitoring.state import Consumed, MonitorState, close_exits, open_alarms

__all__ = [
    "Arrivals",
    "Consumed",
    "Followed",
    "MonitorStart",
    "MonitorState",
    "MonitoredColumns",
    "Quantity",
    "close_exits",
    "follow",
    "open_alarms",
    "read_arrivals",
]
