"""Federated distillation on PyTorch Lightning.

Public names are imported on first use (PEP 562), so that `import fedekd` and `fedekd --help` stay fast.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedekd.data import FederatedDataModule as FederatedDataModule
    from fedekd.federation import Orchestrator as Orchestrator
    from fedekd.modules import GatedPrivateModule as GatedPrivateModule
    from fedekd.modules import MultiExitModule as MultiExitModule
    from fedekd.modules import ProxyDistillModule as ProxyDistillModule

__version__ = "0.1.0"

_HOMES = {
    "FederatedDataModule": "fedekd.data",
    "GatedPrivateModule": "fedekd.modules",
    "MultiExitModule": "fedekd.modules",
    "Orchestrator": "fedekd.federation",
    "ProxyDistillModule": "fedekd.modules",
}
_PACKAGES = (
    "data",
    "do_no_harm",
    "early_exit",
    "export",
    "federation",
    "functional",
    "methods",
    "metrics",
    "models",
    "modules",
    "monitoring",
    "privacy",
    "reporting",
)

__all__ = [
    "FederatedDataModule",
    "GatedPrivateModule",
    "MultiExitModule",
    "Orchestrator",
    "ProxyDistillModule",
    "__version__",
    *_PACKAGES,
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"fedekd.{name}")
    raise AttributeError(f"module 'fedekd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
