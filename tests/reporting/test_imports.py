"""Imports of the package: a command without a report must not wait for them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from fedekd import reporting

# A stub replaces the top-level package, whose imports are not tested here.
SCRIPT = """
import sys, types
package = types.ModuleType("fedekd")
package.__path__ = [sys.argv[1]]
sys.modules["fedekd"] = package
from fedekd.reporting import figures
print({"torch", "lightning", "wandb", "matplotlib", "pandas"} & set(sys.modules))
figures.save(figures.partition([[1, 2]]), sys.argv[2])
print("matplotlib.pyplot" in sys.modules)
"""


def test_reporting_imports_nothing_heavy_and_never_pyplot(tmp_path):
    package_dir = Path(reporting.__file__).parents[1]
    command = [sys.executable, "-c", SCRIPT, str(package_dir), str(tmp_path / "a.png")]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "set()\nFalse\n"
