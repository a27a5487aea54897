"""Round loop of a federated run, the engines that run its clients, and its files."""

from fedekd.federation.engines.base import ClientResult, ComparisonRequest, Engine, EngineConfig, RoundRequest
from fedekd.federation.engines.multiprocess import MultiProcess
from fedekd.federation.engines.pool import PoolEngine
from fedekd.federation.engines.ray_engine import Ray
from fedekd.federation.engines.sequential import Sequential, SequentialEngine
from fedekd.federation.interrupts import Interrupted
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.options import BaselineOptions, RoundOptions
from fedekd.federation.orchestrator import Orchestrator
from fedekd.federation.run_folder import RunFolder
from fedekd.federation.update_validation import UpdateValidator

__all__ = [
    "BaselineOptions",
    "ClientResult",
    "ComparisonRequest",
    "Engine",
    "EngineConfig",
    "Interrupted",
    "MultiProcess",
    "Observer",
    "Orchestrator",
    "PoolEngine",
    "Ray",
    "RoundOptions",
    "RoundRequest",
    "RunFolder",
    "Sequential",
    "SequentialEngine",
    "SilentObserver",
    "UpdateValidator",
]
