"""Invalid input of the HTTP service of an exported model: status 422 or 413, and one line."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("httpx")
testclient = pytest.importorskip("fastapi.testclient")
pytestmark = pytest.mark.export

from examples.serve import exit_times, service  # noqa: E402
from examples.serve.__main__ import main  # noqa: E402
from examples.serve.model import InputError, OnnxModel  # noqa: E402
from fedekd.data import scale  # noqa: E402
from fedekd.data.raw import ReadOptions  # noqa: E402
from fedekd.data.unlabelled import read_images  # noqa: E402

COLUMNS = [
    {"name": "age", "kind": "numeric", "categories": []},
    {"name": "sex", "kind": "categorical", "categories": ["f", "m"]},
]
JSON = {"content-type": "application/json"}


def write(folder: Path, kind: str = "pixels", shape: tuple[int, ...] = (1, 8, 8), is_resized: bool = False) -> Path:
    """Write an export whose value is the sum of the inputs."""
    helper, types = onnx.helper, onnx.TensorProto
    name, dtype = ("rows", types.DOUBLE) if kind == "table" else ("images", types.UINT8)
    graph = helper.make_graph(
        [
            helper.make_node("Cast", [name], ["float"], to=types.DOUBLE),
            helper.make_node("Flatten", ["float"], ["flat"]),
            helper.make_node("ReduceSum", ["flat", "axis"], ["value"], keepdims=0),
        ],
        "sum",
        [helper.make_tensor_value_info(name, dtype, ["batch", *shape])],
        [helper.make_tensor_value_info("value", types.DOUBLE, ["batch"])],
        [helper.make_tensor("axis", types.INT64, [1], [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    content = model.SerializeToString()
    columns = COLUMNS if kind == "table" else []
    inputs = {"name": name, "kind": kind, "shape": shape, "columns": columns, "is_resized": is_resized}
    files = [{"name": "model.onnx", "sha256": hashlib.sha256(content).hexdigest()}]
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(content)
    (folder / "model_card.json").write_text(json.dumps({"files": files, "model": {"inputs": inputs, "classes": []}}))
    return folder


def client(folder: Path) -> Any:
    return testclient.TestClient(service.create_app(OnnxModel(folder)))


def picture(mode: str, size: tuple[int, int] = (8, 8), format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, format, **options)
    return file.getvalue()


def test_service_body_without_a_length_over_the_limit_is_413(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "LARGEST_BODY", 1000)
    sent = []

    def chunks() -> Iterator[bytes]:
        for number in range(10):
            sent.append(number)
            yield bytes(300)

    assert client(write(tmp_path)).post("/predict", content=chunks()).status_code == 413


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("[" * 100_000, "expected JSON, got RecursionError"),
        ('{"inputs": ' + "[" * 500 + "]" * 500 + "}", "inputs: expected"),
        ('{"inputs": [[[[1' + "0" * 400 + "]]]]}", "inputs: expected nested lists of numbers"),
        (json.dumps({"inputs": [[[["1"] * 8] * 8]]}), "inputs: expected nested lists of numbers, got [[[['1'"),
        (json.dumps({"inputs": [[[[0.5] * 8] * 8]]}), "expected whole numbers 0..255, got 0.5"),
        (json.dumps({"inputs": 3}), "expected a list with at least one sample, got 3"),
    ],
)
def test_service_invalid_json_is_422_with_the_value(tmp_path: Path, body: str, text: str) -> None:
    response = client(write(tmp_path)).post("/predict", content=body, headers=JSON)
    assert response.status_code == 422
    assert text in response.json()["detail"]
    assert "\n" not in response.json()["detail"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ('{"age": 1e999, "sex": "f"}', "age: expected a finite number or null, got inf"),
        ('{"age": NaN, "sex": "f"}', "age: expected a finite number or null, got nan"),
        ('{"age": 1' + "0" * 400 + ', "sex": "f"}', "age: expected a finite number or null, got 1000"),
        ('{"age": null, "sex": "f"}', "inputs: expected values with finite outputs, got NaN"),
        ('{"age": 3}', "expected rows with the columns age, sex, null for a missing value, got ['age']"),
        ('{"age": 3, "sex": "f", "sx": 1}', "got ['age', 'sex', 'sx']"),
        ('{"age": "3", "sex": "f"}', "age: expected a finite number or null, got '3'"),
        ('{"age": 3, "sex": "x"}', "sex: expected one of f, m, got 'x'"),
    ],
)
def test_service_invalid_row_is_422_with_the_value(tmp_path: Path, row: str, text: str) -> None:
    app = client(write(tmp_path, "table", (2,)))
    assert app.post("/predict", json={"inputs": [{"age": 3, "sex": "m"}]}).json() == {"predictions": [{"value": 4.0}]}
    response = app.post("/predict", content=f'{{"inputs": [{row}]}}', headers=JSON)
    assert response.status_code == 422
    assert text in response.json()["detail"]


def test_decode_image_unlike_training_raises_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = OnnxModel(write(tmp_path))
    assert model.decode_image(picture("L")).shape == (1, 1, 8, 8)
    frames = picture("L", format="GIF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    other = (
        "expected an image file as the body, got 8 bytes of another type. JSON needs content-type: application/json;"
        " a form (curl -F) is not accepted"
    )
    for content, text in (
        (picture("RGB"), "expected a grey image, got the mode RGB"),
        (picture("I;16"), "expected an image with 8 bits, got the mode I;16"),
        (frames, "expected one image per file, got 2"),
        (b"no image", other),
    ):
        with pytest.raises(InputError) as error:
            model.decode_image(content)
        assert str(error.value) == text
    resized, colour = OnnxModel(write(tmp_path, is_resized=True)), OnnxModel(write(tmp_path, shape=(4, 8, 8)))
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "load", None)
        for decoder, text in (
            (model, "expected 8x8 pixels, got 9000x9000"),
            (resized, "expected at most 50000000 pixels, got 81000000"),
            (colour, "expected JSON, got a file: the model takes images of shape (4, 8, 8)"),
        ):
            with pytest.raises(InputError) as error:
                decoder.decode_image(LARGE)
            assert str(error.value) == text
    assert resized.decode_image(picture("L", (30, 20))).shape == (1, 1, 8, 8)
    assert OnnxModel(write(tmp_path, shape=(3, 8, 8))).decode_image(picture("L")).shape == (1, 3, 8, 8)


@pytest.mark.parametrize("mode", ["I;16", "F", "L"])
@pytest.mark.parametrize(("channels", "size", "bounds"), [(1, 8, None), (3, 8, (0, 4095)), (1, 12, (0, 4095))])
def test_decode_image_of_scaled_model_equals_training(
    tmp_path: Path, mode: str, channels: int, size: int, bounds: tuple[int, int] | None
) -> None:
    folder = write(tmp_path / "model", "scaled_pixels", (channels, 8, 8), is_resized=size != 8)
    card = json.loads((folder / "model_card.json").read_text())
    card["model"]["inputs"]["value_range"] = bounds
    (folder / "model_card.json").write_text(json.dumps(card))
    values = np.random.default_rng(0).random((size, size))
    kind, highest = {"I;16": (np.uint16, 4095), "F": (np.float32, 1), "L": (np.uint8, 255)}[mode]
    path = tmp_path / "image.tif"
    Image.fromarray((values * highest).astype(kind)).save(path)
    options = ReadOptions(image_size=None if size == 8 else 8, value_range=bounds)
    [expected] = read_images(path, options, channels).batches(1)
    decoded = OnnxModel(folder).decode_image(path.read_bytes())
    assert decoded.dtype == np.float32
    np.testing.assert_array_equal(decoded, scale(expected).numpy())
    if bounds and mode == "I;16":
        Image.fromarray(np.full((size, size), 5000, np.uint16)).save(path)
        with pytest.raises(InputError, match=r"expected values in 0\.\.4095, got 5000\.\.5000"):
            OnnxModel(folder).decode_image(path.read_bytes())


LARGE = picture("1", (9000, 9000))


@pytest.mark.parametrize(
    "card",
    ["[1]", "{}", '{"files": [3]}', "[" * 100_000, '{"files": [], "model": 3}', '{"files": [{"name": 1}]}'],
)
def test_serve_invalid_folder_prints_one_line(tmp_path: Path, card: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model_card.json").write_text(card)
    assert main([str(tmp_path)]) == 2
    output = capsys.readouterr().err
    assert output.startswith("error: ")
    assert output.count("\n") == 1


def test_exit_times_takes_images_at_regular_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write(tmp_path / "exported")
    for number in range(12):
        Image.fromarray(np.full((8, 8), number, np.uint8)).save(tmp_path / f"{number:02}.png")
    assert exit_times.main([str(folder), str(tmp_path), "--runs=0"]) == 2
    assert "--runs: expected at least 1, got 0" in capsys.readouterr().err
    decoded = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            OnnxModel, "decode_image", lambda self, content: decoded.append(content) or np.zeros((1, 1, 8, 8))
        )
        patch.setattr(OnnxModel, "predict", lambda self, *arguments, **options: [{"exit": 1}])
        assert exit_times.main([str(folder), str(tmp_path), "--runs=3"]) == 0
    assert decoded == [(tmp_path / f"{number:02}.png").read_bytes() for number in (0, 4, 8)]


def test_service_other_group_than_exported_is_422(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    card = json.loads((folder / "model_card.json").read_text())
    card["guarantee"] = {"groups": {"column": "scanner", "names": ["A"]}}
    (folder / "model_card.json").write_text(json.dumps(card))
    inputs, app = np.zeros((1, 1, 8, 8), int).tolist(), client(folder)
    for group, status in (("A", 200), (None, 422), (["A"], 422), ("B", 422)):
        answer = app.post("/predict", json={"inputs": inputs, "group": group})
        assert answer.status_code == status
    assert answer.json()["detail"] == "group: expected scanner A, got 'B'"
    for query, status in (("?group=A", 200), ("?group=B", 422), ("", 422)):
        assert app.post(f"/predict{query}", json={"inputs": inputs}).status_code == status
        answer = app.post(f"/predict{query}", content=picture("L"))
        assert answer.status_code == status
    assert answer.json()["detail"] == "group: expected scanner A, got none"


@pytest.mark.parametrize("column", ["", "predicted_class", "true_class"])
def test_service_without_groups_of_a_column_needs_none(tmp_path: Path, column: str) -> None:
    folder = write(tmp_path / "model")
    card = json.loads((folder / "model_card.json").read_text())
    card["guarantee"] = {"groups": {"column": column, "names": ["A"] if column else []}}
    (folder / "model_card.json").write_text(json.dumps(card))
    assert client(folder).post("/predict", content=picture("L")).status_code == 200
