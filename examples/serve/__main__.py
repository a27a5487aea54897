"""Serve an exported model: python -m examples.serve FOLDER --port 8000."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from examples.serve.model import InputError, OnnxModel


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until the process is stopped; exit code 2 for invalid input."""
    parser = argparse.ArgumentParser(prog="python -m examples.serve", description=__doc__)
    parser.add_argument("folder", type=Path, help="Folder of fedekd export --format onnx.")
    parser.add_argument("--host", default="127.0.0.1", help="Address; 0.0.0.0 accepts other machines.")
    parser.add_argument("--port", type=int, default=8000, help="Port.")
    parser.add_argument("--threads", type=int, default=1, help="Threads of one prediction.")
    arguments = parser.parse_args(argv)
    try:
        import uvicorn

        from examples.serve.service import create_app

        model = OnnxModel(arguments.folder, arguments.threads)
    except (InputError, ImportError) as error:
        hint = " Install examples/serve/requirements.txt" if isinstance(error, ImportError) else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return 2
    uvicorn.run(create_app(model), host=arguments.host, port=arguments.port, log_level="warning")
    return 0


if __name__ == "__main__":
    sys.exit(main())
