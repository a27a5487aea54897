"""FastAPI application of an exported model."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.concurrency import run_in_threadpool

from examples.serve.model import InputError, OnnxModel

#: Bytes of a request body.
LARGEST_BODY = 64 * 1024 * 1024


def create_app(model: OnnxModel) -> FastAPI:
    """Create the application.

    Routes: `GET /health`, `GET /card`, and `POST /predict` with the bytes of an image file, or JSON
    `{"inputs": [...]}` with one or more samples.

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
        if int(request.headers.get("content-length", 0)) > LARGEST_BODY:
            raise HTTPException(413, f"expected at most {LARGEST_BODY} bytes")
        body = await request.body()
        try:
            inputs = _inputs(model, body, request.headers.get("content-type", ""))
        except InputError as error:
            raise HTTPException(422, str(error)) from error
        return {"predictions": await run_in_threadpool(model.predict, inputs)}

    return app


def _inputs(model: OnnxModel, body: bytes, content_type: str) -> Any:
    if not content_type.startswith("application/json"):
        return model.decode_image(body)
    try:
        values = json.loads(body)
    except ValueError as error:
        raise InputError("expected JSON") from error
    if not isinstance(values, dict) or "inputs" not in values:
        raise InputError('expected an object with "inputs"')
    return model.decode_json(values["inputs"])
