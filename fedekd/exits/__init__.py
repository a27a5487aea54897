"""Leaving a network early: the policy, inference that skips what is not needed, and what it saves."""

from fedekd.exits.budget import BUDGETS, Point, budget_points, cost_of, exit_points
from fedekd.exits.fingerprint import network_fingerprint
from fedekd.exits.inference import Departures, infer
from fedekd.exits.latency import Latency, measure_latency
from fedekd.exits.policy import ExitPolicy, assign_exits

__all__ = [
    "BUDGETS",
    "Departures",
    "ExitPolicy",
    "Latency",
    "Point",
    "assign_exits",
    "budget_points",
    "cost_of",
    "exit_points",
    "infer",
    "measure_latency",
    "network_fingerprint",
]
