"""Programs of exports: exits of ONNX equal those of the framework, errors name the layer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from policies import SHAPE, by_class, calibrated, framework, images
from torch import Tensor, nn

from fedekd.errors import UserError
from fedekd.export.comparison import open_session, session_outputs
from fedekd.export.inputs import InputFormat, PixelScaling
from fedekd.export.programs import onnx_program, torch_program
from fedekd.export.served import ServedNetwork

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.export

PIXELS = InputFormat("pixels", SHAPE)


def operators(graph: onnx.GraphProto) -> list[str]:
    inner = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return [node.op_type for node in graph.node] + [name for branch in inner for name in operators(branch)]


@pytest.mark.parametrize(
    "score",
    ["max_softmax", *(pytest.param(name, marks=pytest.mark.slow) for name in ("margin", "entropy", "agreement"))],
)
def test_onnx_programs_random_images_have_the_exits_of_the_policy(score: str) -> None:
    network, proxy, policy = calibrated(score)
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy, proxy)
    expected = framework(network, proxy, policy, images())
    early = onnx_program(served, PIXELS, {"fedekd": "text"}, early_exit=True)
    for content, single in ((onnx_program(served, PIXELS, {}, early_exit=False), False), (early, True)):
        outputs = session_outputs(open_session(content), images(), single)
        assert outputs["exit"].tolist() == expected["exit"].tolist()
        assert outputs["label"].tolist() == expected["label"].tolist()
        np.testing.assert_allclose(outputs["probabilities"], expected["probabilities"], rtol=0, atol=2e-6)
        np.testing.assert_allclose(outputs["score"], expected["score"], rtol=0, atol=2e-6)
    model = onnx.load_from_string(early)
    assert [node.op_type for node in model.graph.node].count("Conv") == 1 + 2 * (score == "agreement")
    assert operators(model.graph).count("If") == 2
    assert {entry.key: entry.value for entry in model.metadata_props}["fedekd"] == "text"


class Unknown(nn.Module):
    """A layer with an operator that ONNX lacks."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.airy_ai(x)


class Branch(nn.Module):
    """A layer whose control flow depends on values."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(("layer", "part"), [(Unknown(), "operator aten.special_airy_ai"), (Branch(), "fails with")])
def test_onnx_program_layer_that_cannot_be_exported_is_named(layer: nn.Module, part: str) -> None:
    network = nn.Sequential(nn.Flatten(), nn.Sequential(nn.Linear(64, 4), layer))
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification")
    with pytest.raises(UserError) as error:
        onnx_program(served, PIXELS, {}, early_exit=False)
    assert f"layer '1.1' ({type(layer).__name__})" in str(error.value)
    assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_torch_program_takes_any_batch_size() -> None:
    network, proxy, policy = calibrated("max_softmax")
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy, proxy)
    content = torch_program(served, PIXELS, {"fedekd": "text"})
    import io

    program = torch.export.load(io.BytesIO(content)).module()
    expected = framework(network, proxy, policy, images())
    parts = [program(batch)[3] for batch in images().split([1, 2, 197, 200])]
    assert torch.cat(parts).tolist() == expected["exit"].tolist()


@pytest.mark.parametrize("early_exit", [False, True])
def test_onnx_programs_thresholds_per_predicted_class_have_the_exits_of_the_policy(early_exit: bool) -> None:
    network, proxy, policy = calibrated("max_softmax")
    policy = by_class(policy)
    served = ServedNetwork(network, PixelScaling(torch.float32), "classification", policy)
    raw = images(100)
    content = onnx_program(served, InputFormat("pixels", SHAPE), {}, early_exit)
    outputs = session_outputs(open_session(content), raw, single=early_exit)
    assert outputs["exit"].tolist() == framework(network, proxy, policy, raw)["exit"].tolist()
