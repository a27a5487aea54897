"""The round loop of a federation, where its clients run, and what it keeps on disk."""

from fedekd.federation.engine import Engine, InProcess, InProcessEngine, Placement, Visit
from fedekd.federation.guard import Guard
from fedekd.federation.interrupts import Interrupted
from fedekd.federation.observer import Observer, SilentObserver
from fedekd.federation.options import RoundOptions
from fedekd.federation.orchestrator import Orchestrator
from fedekd.federation.ray_engine import Ray, RayEngine
from fedekd.federation.run_folder import RunFolder
from fedekd.federation.side_by_side import SideBySide, SideBySideEngine

__all__ = [
    "Engine",
    "Guard",
    "InProcess",
    "InProcessEngine",
    "Interrupted",
    "Observer",
    "Orchestrator",
    "Placement",
    "Ray",
    "RayEngine",
    "RoundOptions",
    "RunFolder",
    "SideBySide",
    "SideBySideEngine",
    "SilentObserver",
    "Visit",
]
