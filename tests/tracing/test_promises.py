"""What users promise of sizes: `multiple_of`, and `dynamic_shapes` as torch.export takes it."""

import json

import pytest
import torch
from harness import compare
from test_tracing import module
from torch.export import Dim

from torch2rt import InputError, torch2rt
from torch2rt.interface import Interface


def _flat(self, x):
    return x.flatten(1) * 2 if x.shape[1] % 8 == 0 else x.mean()


def _scaled(self, x):
    """Guidance: the first half of the batch beside the second, and a length that is rounded to itself."""
    if x.shape[0] % 2 or x.shape[2] % 6:
        return x.sum()
    first, second = x.chunk(2)
    return (first - second)[..., : torch.sym_int(x.shape[2] / 6) * 6 // 3]


def _next(self, x, y):
    return x + y[:-1] if x.shape[0] == y.shape[0] - 1 else x


def _same(self, x, state):
    return x + state["a"][0] if x.shape[0] == state["a"][0].shape[0] else x.sum()


def _half(self, x, y):
    if y.shape[0] * 2 != x.shape[0]:
        return x.sum()
    return x + torch.cat([y, -y])


h = Dim("h", min=1, max=9)
CASES = [  # a module, examples, what is promised, calls that keep it, calls that do not with what is said of them
    (
        _flat,
        [(2, 16)],
        dict(min_shapes=[(1, 3)], max_shapes=[(4, 70)], multiple_of=[(1, 8)]),
        [[(1, 8)], [(3, 24)], [(4, 64)]],
        [([(2, 12)], r"x.shape\[1\] to be a multiple of 8")],
    ),
    (
        _flat,
        [(2, 16)],
        dict(dynamic_shapes={"x": {0: Dim("b", max=4), -1: 8 * Dim("h8", min=1, max=9)}}),
        [[(1, 8)], [(3, 24)], [(4, 72)]],
        [([(2, 12)], r"x.shape\[1\] to be a multiple of 8"), ([(5, 8)], "serves 1 to 4")],
    ),
    (
        _scaled,
        [(4, 3, 12)],
        dict(max_batch_size=8, max_shapes={"x": (8, 3, 60)}, multiple_of={"x": (2, 1, 6)}),
        [[(2, 3, 12)], [(6, 3, 18)], [(8, 3, 60)]],
        [([(3, 3, 12)], "multiple of 2"), ([(2, 3, 13)], "multiple of 6")],
    ),
    (
        _next,
        [(3, 2), (4, 2)],
        dict(dynamic_shapes=({0: h}, (h + 1, None))),
        [[(1, 2), (2, 2)], [(9, 2), (10, 2)]],
        [([(5, 2), (5, 2)], r"y.shape\[0\] - 1 == x.shape\[0\]")],
    ),
    (
        _same,
        [(3, 2), {"a": [(3, 2)]}],
        dict(dynamic_shapes={"x": (h, Dim.STATIC), "state": {"a": [{0: h}]}}),
        [[(1, 2), {"a": [(1, 2)]}], [(7, 2), {"a": [(7, 2)]}]],
        [([(7, 2), {"a": [(6, 2)]}], r"state_a_0.shape\[0\] == x.shape\[0\]")],
    ),
    (
        _half,
        [(6, 2), (3, 2)],
        dict(dynamic_shapes={"x": {0: 2 * h}, "y": {0: h}}),
        [[(2, 2), (1, 2)], [(10, 2), (5, 2)]],
        [([(8, 2), (5, 2)], r"2\*y.shape\[0\] == x.shape\[0\]")],
    ),
    (
        _next,
        [(3, 2), (4, 2)],
        dict(dynamic_shapes=({0: h}, {0: h + 1, 1: 2})),
        [[(4, 2), (5, 2)]],
        [([(4, 2), (5, 3)], "serves 2")],
    ),
]


def _tensors(shapes):
    if isinstance(shapes, dict):
        return {key: _tensors(value) for key, value in shapes.items()}
    return list(map(_tensors, shapes)) if isinstance(shapes, list) else torch.randn(shapes)


@pytest.mark.parametrize(("forward", "example", "promised", "kept", "broken"), CASES, ids=range(len(CASES)))
def test_promises_remove_branches_and_are_checked_at_calls(forward, example, promised, kept, broken):
    made = module(forward)
    model_trt = torch2rt(made, _tensors(example), **promised)
    run = model_trt.reference()
    for shapes in (example, *kept):
        inputs = _tensors(shapes)
        compare(run(*inputs), made(*inputs))
    for shapes, message in broken:
        with pytest.raises(InputError, match=message):
            run(*_tensors(shapes))
    restored = Interface.from_json(json.loads(json.dumps(model_trt.interface.to_json())))
    assert restored.to_json() == model_trt.interface.to_json()


def test_open_ranges_are_those_of_min_and_max_shapes():
    made = module(lambda self, x, y: x * 2 + y.sum())
    ranges = {"min_shapes": [(2, 3), (1, 3)], "max_shapes": [(5, 3), (6, 3)]}
    model_trt = torch2rt(
        made, [torch.randn(3, 3)] + [torch.randn(4, 3)], dynamic_shapes=({0: Dim("b")}, {0: Dim.AUTO}), **ranges
    )
    assert [spec.describe() for spec in model_trt.interface.inputs] == ["float32[2..5, 3]", "float32[1..6, 3]"]
    other = torch2rt(made, [torch.randn(3, 3), torch.randn(4, 3)], dynamic_shapes=(None, {0: Dim.AUTO(min=2, max=7)}))
    assert [spec.describe() for spec in other.interface.inputs] == ["float32[3, 3]", "float32[2..7, 3]"]


ERRORS = [
    (dict(dynamic_shapes={"z": {0: h}}), r"names \['z'\], the arguments are \['x', 'y'\]"),
    (dict(dynamic_shapes={"x": {5: h}}), r"dimension 5 of an example of shape \(3, 2\)"),
    (dict(dynamic_shapes={"x": (h,)}), "has 1 dimensions"),
    (dict(dynamic_shapes=({0: h},)), "must have 2 items"),
    (dict(dynamic_shapes=7), "must be a dict by the names"),
    (dict(dynamic_shapes={"x": 3}), "a dict by dimension"),
    (dict(dynamic_shapes={"x": {0: "a"}}), "must be a torch.export.Dim"),
    (dict(dynamic_shapes={"x": {1: 7}}), "the size is 7, the example has 2"),
    (dict(dynamic_shapes={"x": {0: Dim("b")}}), "TensorRT needs a largest size"),
    (dict(dynamic_shapes={"x": {0: h}, "y": {0: Dim("h", min=2, max=9)}}), "Dim 'h' has two ranges"),
    (dict(dynamic_shapes={"x": {0: h}}, max_batch_size=3), "leave one of them out"),
    (dict(dynamic_shapes={"x": None}, max_shapes=[(5, 2), (4, 2)]), "static in dynamic_shapes"),
    (dict(dynamic_shapes={"x": {0: h}}, max_shapes=[(5, 2), (4, 2)]), "max 9 in dynamic_shapes contradicts"),
    (dict(multiple_of=[(0, 1), (1, 1)]), "multiple_of must be at least 1, is 0"),
    (dict(multiple_of=[(1, 3), (1, 1)]), "size 2 is no multiple of 3"),
    (dict(max_batch_size=7, multiple_of=[(8, 1), (8, 1)]), "no size from 1 to 7 is a multiple of 8"),
    (
        dict(max_shapes=[(9, 2), (4, 2)], opt_shapes=[(5, 2), (4, 2)], multiple_of=[(3, 1), (1, 1)]),
        "the opt size 5 is not a multiple of 3",
    ),
]


@pytest.mark.parametrize(("promised", "message"), ERRORS, ids=[message for _, message in ERRORS])
def test_promises_that_cannot_be_understood_are_refused(promised, message):
    with pytest.raises(InputError, match=message):
        torch2rt(module(lambda self, x, y: x.sum() + y), [torch.randn(3, 2), torch.randn(4, 2)], **promised)
