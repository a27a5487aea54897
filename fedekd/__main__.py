"""Command line of fedekd: `python -m fedekd fit --config digits.yaml`."""

import sys

from fedekd.cli import main

if __name__ == "__main__":
    sys.exit(main())
