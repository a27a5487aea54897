"""Command line of the project.

Run: python -m examples.lightning_project fit --config examples/lightning_project/config.yaml

The data module, the networks and the configuration are the project's own; only the training modules come from fedekd.
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

from examples.lightning_project import networks
from examples.lightning_project.data import DigitsOfSite
from fedekd.modules import ObjectiveModule

__all__ = ["main", "networks"]


def main(args: Sequence[str] | None = None) -> LightningCLI:
    """Run a command of the Trainer, such as `fit`.

    Args:
        args: Arguments of the command line; None reads those of the process.
    """
    return LightningCLI(
        ObjectiveModule,
        DigitsOfSite,
        subclass_mode_model=True,
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
    )


if __name__ == "__main__":
    main()
