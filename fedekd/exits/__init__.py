"""Leaving a network early: the policy, inference that skips what is not needed, and what it saves."""

from fedekd.exits.fingerprint import network_fingerprint
from fedekd.exits.inference import Departures, infer
from fedekd.exits.latency import Latency, measure_latency
from fedekd.exits.policy import ExitPolicy, assign_exits

__all__ = [
    "Departures",
    "ExitPolicy",
    "Latency",
    "assign_exits",
    "infer",
    "measure_latency",
    "network_fingerprint",
]
