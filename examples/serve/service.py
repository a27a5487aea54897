"""FastAPI application of an exported model."""

from __future__ import annotations

import json
import reprlib
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from examples.serve.model import InputError, OnnxModel

#: Bytes of a request body.
LARGEST_BODY = 64 * 1024 * 1024


def create_app(model: OnnxModel) -> FastAPI:
    """Create the application.

    Routes: `GET /health`, `GET /card`, and `POST /predict` with the bytes of an image file, or JSON
    `{"inputs": [...]}` with one or more samples. If the guarantee of the card is for groups of a column, a request
    names the group of its samples: `"group"` in JSON, or the query parameter `group`.

    Args:
        model: The loaded model.
    """
    app = FastAPI(title="fedekd model")

    @app.get("/health")
    def health() -> dict[str, Any]:
        """Return `ok` and the digest of each model file."""
        return {"status": "ok", "files": {entry["name"]: entry["sha256"] for entry in model.card["files"]}}

    @app.get("/card")
    def card() -> dict[str, Any]:
        """Return the model card."""
        return model.card

    @app.post("/predict")
    async def predict(request: Request) -> dict[str, Any]:
        """Return `predictions`, one row per sample."""
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > LARGEST_BODY:
                raise HTTPException(413, f"expected at most {LARGEST_BODY} bytes, got more")
        try:
            content_type = request.headers.get("content-type", "")
            group = request.query_params.get("group")
            return {"predictions": await run_in_threadpool(_predictions, model, bytes(body), content_type, group)}
        except InputError as error:
            raise HTTPException(422, str(error)) from error

    return app


def _predictions(model: OnnxModel, body: bytes, content_type: str, group: str | None) -> list[dict[str, Any]]:
    if not content_type.startswith("application/json"):
        model.check_group(group)
        return model.predict(model.decode_image(body))
    try:
        values = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected JSON, got {type(error).__name__}: {error}") from error
    if not isinstance(values, dict) or "inputs" not in values:
        raise InputError(f'expected an object with "inputs", got {reprlib.repr(values)}')
    model.check_group(group if values.get("group") is None else values["group"])
    return model.predict(model.decode_json(values["inputs"]))
