from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from fedekd.data import Samples, StoredInputs, StoredPart
from fedekd.data.assemble import assemble
from fedekd.data.pixels import to_pixels
from fedekd.data.raw import RawSamples, ReadOptions
from fedekd.errors import UserError


def raw(targets: Sequence[Any], shape: tuple[int, ...] = (8, 8), **fields: Any) -> RawSamples:
    images = np.random.default_rng(0).integers(0, 256, (len(targets), *shape), dtype=np.uint8)
    arrays = {name: np.asarray(fields.pop(name), dtype=object) for name in ("site", "group") if name in fields}
    return RawSamples(images, np.asarray(targets), **arrays, **fields)


def joined(*parts: RawSamples, **options: Any) -> Samples:
    names = [None] if len(parts) == 1 else [f"site {index}" for index in range(len(parts))]
    return assemble("data", dict(zip(names, parts, strict=True)), ReadOptions(**options))


def test_names_of_classes_are_numbered_over_all_sites() -> None:
    samples = joined(raw(["no", "maybe", "no"]), raw(["yes", "no"]))
    assert samples.class_names == ("maybe", "no", "yes")
    assert samples.targets.tolist() == [1, 0, 1, 2, 1]
    assert samples.site.tolist() == [0, 0, 0, 1, 1]


def test_class_names_of_sources_are_joined_by_name() -> None:
    first, second = raw([0, 1, 1], class_names=("cat", "dog")), raw([0, 1, 0], class_names=("dog", "emu"))
    samples = joined(first, second)
    assert samples.class_names == ("cat", "dog", "emu")
    assert samples.targets.tolist() == [0, 1, 1, 1, 2, 1]


def test_names_that_are_numbers_are_sorted_by_value() -> None:
    samples = joined(raw(["10", "9", "2", "2"]))
    assert samples.class_names == ("2", "9", "10")
    assert samples.targets.tolist() == [2, 1, 0, 0]
    assert joined(raw(["2", "0", "2", "0"]), num_classes=4).targets.tolist() == [2, 0, 2, 0]


def test_declared_classes_give_the_order_and_names() -> None:
    samples = joined(raw(["b", "a", "b"]), classes=["b", "a", "c"])
    assert (samples.targets.tolist(), samples.num_classes) == ([0, 1, 0], 3)
    for targets in ([0, 2, 0], ["0", "2", "0"]):
        samples = joined(raw(targets), classes=["b", "a", "c"])
        assert (samples.targets.tolist(), samples.class_names) == ([0, 2, 0], ("b", "a", "c"))


def test_numbers_get_their_digits_as_names() -> None:
    assert joined(raw([0, 2, 1])).class_names == ("0", "1", "2")


def test_real_valued_targets_have_no_classes() -> None:
    samples = joined(raw([0.5, 2.0, 1.0]), task="regression")
    assert (samples.num_classes, samples.class_names) == (0, ())
    assert samples.targets.tolist() == [0.5, 2.0, 1.0]
    assert samples.labels.tolist() == [0, 0, 0]


def test_groups_of_two_sites_are_different() -> None:
    samples = joined(raw([0, 1, 0], group=["p1", "p2", "p1"]), raw([0, 1], group=["p1", "p1"]), group_column="patient")
    assert samples.group.tolist() == [0, 1, 0, 2, 2]


def test_groups_of_one_source_only_are_kept_and_other_samples_are_groups() -> None:
    samples = joined(raw([0, 1]), raw([0, 1, 0], group=["p1", "p2", "p1"]), raw([1]))
    assert samples.group.tolist() == [0, 1, 2, 3, 2, 4]
    assert [samples.group_names[number] for number in (2, 3)] == ["p1", "p2"]
    assert joined(raw([0, 1]), raw([0, 1])).group is None


def test_site_column_names_sites() -> None:
    samples = joined(raw([0, 1, 0], site=["x", "a", "x"]), site_column="hospital")
    assert (samples.site_names, samples.site.tolist()) == (("a", "x"), [1, 0, 1])


def test_splits_are_kept_if_all_sources_have_them() -> None:
    given = raw([0, 1, 0], split=np.array([0, 2, 1], np.int8))
    assert joined(given, given).split.tolist() == [0, 2, 1, 0, 2, 1]
    assert joined(given, raw([0, 1])).split is None


def test_ignore_label_leaves_out_the_fields_of_its_samples() -> None:
    part = raw([0, 1, 9, 0], group=["a", "b", "c", "d"], split=np.array([0, 1, 2, 0], np.int8))
    samples = joined(part, group_column="patient", ignore_label=9)
    assert (len(samples), samples.group.tolist(), samples.split.tolist()) == (3, [0, 1, 3], [0, 1, 0])


@pytest.mark.parametrize("kinds", [("uint8", "uint16"), ("uint16", "float32"), ("float64", "uint8"), ("float32",) * 2])
@pytest.mark.parametrize("stored", [0, 1])
def test_stored_and_resident_sites_are_scaled_alike(kinds: tuple[str, str], stored: int) -> None:
    rng = np.random.default_rng(0)
    highest = {"uint8": 255, "uint16": 65535, "float32": 1.0, "float64": 1.0}
    parts = [raw([0, 1, 0]) for _ in kinds]
    images = [(rng.random((3, 8, 8)) * highest[kind]).astype(kind) for kind in kinds]
    resident = joined(*(replace(part, inputs=array) for part, array in zip(parts, images, strict=True)))
    items = torch.from_numpy(to_pixels("", images[stored])[0])[:, None]
    mixed: list[Any] = list(images)
    mixed[stored] = StoredInputs([StoredPart(items)])
    samples = joined(*(replace(part, inputs=inputs) for part, inputs in zip(parts, mixed, strict=True)))
    assert isinstance(samples.inputs, StoredInputs)
    assert torch.equal(samples.inputs[torch.arange(6)], resident.inputs[torch.arange(6)])


def test_stored_and_resident_sites_report_a_small_range() -> None:
    images = np.random.default_rng(0).integers(0, 4096, (3, 8, 8)).astype(np.uint16)
    stored = replace(raw([0, 1, 0]), inputs=StoredInputs([StoredPart(torch.rand(3, 1, 8, 8))]))
    [line] = joined(stored, replace(raw([0, 1, 0]), inputs=images)).warnings
    assert line.startswith("data.value_range: images of 'site 1' use only the values")


@pytest.mark.parametrize(("lowest", "lines"), [((0, 0), ["'data'"]), ((0, 200), ["'site 0'", "'site 1'"])])
def test_small_range_of_all_sites_is_reported_once(lowest: tuple[int, int], lines: list[str]) -> None:
    images = np.random.default_rng(0).integers(0, 16, (3, 8, 8)).astype(np.uint8)
    warnings = joined(*(replace(raw([0, 1, 0]), inputs=images + np.uint8(low)) for low in lowest)).warnings
    assert len(warnings) == len(lines)
    assert all(f"images of {name} use only" in line for name, line in zip(lines, warnings, strict=True))


@pytest.mark.parametrize("other", ["uint8", "float32"])
@pytest.mark.parametrize(("pixels", "text"), [(0, "expected different pixels, got 0"), (1, "got no pixel above 1")])
def test_pixels_of_each_site_are_checked(other: str, pixels: int, text: str) -> None:
    images = np.zeros((3, 8, 8), np.uint8)
    images[0, 0, 0] = pixels
    neighbour = replace(raw([0, 1, 0]), inputs=np.random.default_rng(0).random((3, 8, 8)).astype(np.float32))
    if other == "uint8":
        neighbour = replace(neighbour, inputs=(neighbour.inputs * 255).astype(np.uint8))
    with pytest.raises(UserError, match=f"images of 'site 1': .*{text}"):
        joined(neighbour, replace(raw([0, 1, 0]), inputs=images))


@pytest.mark.parametrize(
    ("parts", "options", "text"),
    [
        ([raw([0, 1]), raw([0, 1], (9, 8))], {}, r"data.sites: .*\(8, 8\) as in 'site 0', got \(9, 8\) in 'site 1'"),
        ([raw(["a", "x"])], {"classes": ["a", "b"]}, "data.classes: .*one of a, b, got the class 'x'"),
        ([raw(["a", "b"])], {"num_classes": 3}, "data.num_classes: .*expected 2, the number of classes, got 3"),
        ([raw([0, 1])], {"classes": ["a", "b"], "num_classes": 3}, r"data.num_classes: expected 2 \(data.classes\)"),
        ([raw(["a", ""])], {}, "expected a class for every sample, got none in row 2"),
        ([raw([0, -1])], {}, "expected labels .*, got label -1"),
        ([raw([0, 1])], {"categories": {"a": ["x"]}}, "data.categories: expected null for images"),
        ([raw([0, 1])], {"categorical_columns": ["a"]}, "data.categorical_columns: expected null for images"),
        ([raw([0.4, 1.0])], {}, "expected whole numbers, got 0.4"),
        ([raw([[1, 0], [0, 1]])], {}, "expected one label per image"),
        ([raw([0, 1])], {"site_column": "x"}, "data.site_column: expected a column or array of the data, got 'x'"),
        ([raw([0, 1]), raw([1, 0])], {"group_column": "x"}, "data.group_column: .* of site 'site 0', got 'x'"),
        (
            [raw([0, 1], site=["Bern", "bern"])],
            {"site_column": "x"},
            "data.site_column: .*different .*'Bern' and 'bern'",
        ),
        ([raw([0, 1], site=["a/b", "c"])], {"site_column": "x"}, "expected a name of at most 60 letters"),
        ([raw(["a", "b"])], {"task": "regression"}, r"expected finite numbers up to 1e\+30, got <U1"),
    ],
)
def test_assemble_invalid_sources_raise(parts: list[RawSamples], options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        joined(*parts, **options)


@pytest.mark.parametrize(
    ("targets", "classes", "expected"),
    [
        (["1", "2", "3"], ["1", "2", "3", "4"], [0, 1, 2]),
        (["1", "0"], ["1", "0"], [0, 1]),
        ([1, 2, 3], ["1", "2", "3", "4"], [0, 1, 2]),
        ([1.0, 0.0], ["1", "0"], [0, 1]),
        ([0, 1, 2], ["10", "20", "30"], [0, 1, 2]),
        (["0", "1"], ["10", "20"], [0, 1]),
    ],
)
def test_declared_classes_that_are_numbers_match_by_name_first(
    targets: list[Any], classes: list[str], expected: list[int]
) -> None:
    for samples in (joined(raw(targets), classes=classes), joined(raw(targets), raw(targets), classes=classes)):
        assert samples.targets.tolist()[: len(targets)] == expected
        assert samples.class_names == tuple(classes)


def test_ignore_label_that_is_no_declared_class_leaves_out_its_samples_only() -> None:
    samples = joined(raw([0, 1, 2, 0]), classes=["1", "2"], ignore_label=0)
    assert samples.targets.tolist() == [0, 1]
    samples = joined(raw([0, 1, 9]), classes=["b", "a"], ignore_label=9)
    assert samples.targets.tolist() == [0, 1]
    samples = joined(raw([0, 1, 7, 0], class_names=("a", "b")), raw([0, 7], class_names=("c", "b")), ignore_label=7)
    assert samples.targets.tolist() == [0, 1, 0, 2]
    assert joined(raw(["b", "a", "-1"]), ignore_label=-1).targets.tolist() == [1, 0]
    samples = joined(raw([0, 1, 2], class_names=("a", "b", "unknown")), ignore_label=2)
    assert samples.targets.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("parts", "options", "text"),
    [
        ([raw([0, 1], class_names=("a", "a"))], {}, "expected different names of classes, got 'a' twice"),
        (
            [raw(["p", "q"])],
            {"classes": ["p", "q", "r", "p"]},
            "data.classes: expected .*different names, got 'p' twice",
        ),
        ([raw(["p", "q"])], {"classes": []}, r"data.classes: expected at least 2 different names, got \[\]"),
        ([raw(["p", "q"])], {"categories": {"b": ["x", "x"]}}, "data.categories: expected .* of 'b', got 'x' twice"),
        ([raw(["p", "q"])], {"categories": {"b": [1, 1.0]}}, "data.categories: expected .* of 'b', got '1' twice"),
        ([raw(["p", "q"])], {"categories": {"b": []}}, "data.categories: expected at least one .*'b', got none"),
    ],
)
def test_assemble_repeated_or_no_names_raise(parts: list[RawSamples], options: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        joined(*parts, **options)


@pytest.mark.parametrize(("option", "value"), [("image_size", 8), ("value_range", [0.0, 1.0])])
def test_assemble_option_of_images_for_a_table_raises(option: str, value: Any) -> None:
    table = RawSamples(pd.DataFrame({"age": [1.0, 2.0]}), np.array([0, 1]))
    with pytest.raises(UserError, match=f"data.{option}: expected null for tables, .* got "):
        joined(table, **{option: value})
