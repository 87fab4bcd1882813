import collections
import dataclasses
import json

import pytest
import torch

from torch2rt.errors import EngineError, InputError
from torch2rt.structure import flatten, take, unflatten


@dataclasses.dataclass
class Pair:
    first: torch.Tensor
    second: torch.Tensor | None = None


@dataclasses.dataclass
class Derived:
    first: torch.Tensor
    count: int = dataclasses.field(default=3, init=False)


class Output(collections.OrderedDict):
    """A dict subclass with a constructor that takes pairs."""


Point = collections.namedtuple("Point", ["x", "y"])
A, C = torch.ones(2), torch.zeros(3)

VALUES = [
    A,
    (A, C),
    [A, (C, None), {"k": A}],
    {"a": A, 3: [C, 1.5, "text", True]},
    Point(A, y=C),
    Pair(A),
    Pair(A, C),
    Derived(A),
    Output([("a", A), ("b", [C])]),
    {"dtype": torch.float16, "device": torch.device("cpu"), "t": A},
    torch.return_types.max((A, C)),
]


def same(a, b):
    if isinstance(a, torch.Tensor):
        return a is b
    if dataclasses.is_dataclass(a):
        return type(a) is type(b) and all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return type(a) is type(b) and list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return a == b


PLAIN = [
    A,
    (A, C),
    [A, C],
    (A,),
    [A, (C, None), {"k": A}],
    [A, (C, 0), {"k": A}],
    [A, [C, None], {"k": A}],
    {"a": A, "b": C},
    {"b": C, "a": A},
    {1: A},
    {True: A},
    {"1": A},
    (),
    [],
    {},
    None,
    torch.Size([2, 1]),
    (A, 1),
    (A, 1.0),
    (A, True),
    (A, "1"),
    (A, None),
    (A, -0.0),
    (A, 0.0),
    (A, float("nan")),
    (A, float("inf")),
]


def test_what_is_taken_is_what_flatten_finds():
    """Of all pairs: a value is taken if it has the other's description, and only then; but for classes, never."""
    taken = 0
    for a in [*PLAIN, *VALUES]:
        spec = json.loads(json.dumps(flatten(a, torch.is_tensor)[1]))
        for b in [*PLAIN, *VALUES]:
            leaves, other = flatten(b, torch.is_tensor)
            found = []
            if take(spec, b, found):
                assert json.dumps(spec) == json.dumps(other) and same(found, leaves)
                taken += 1
            elif any(b is plain for plain in PLAIN) and not isinstance(b, torch.Size):
                assert json.dumps(spec) != json.dumps(other)
    assert taken >= len(PLAIN)


@pytest.mark.parametrize("value", VALUES, ids=lambda v: type(v).__name__)
def test_a_nested_value_survives_json(value):
    leaves, spec = flatten(value, torch.is_tensor)
    assert same(unflatten(json.loads(json.dumps(spec)), leaves), value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([A, object()], r"value\[1\]: a object is not a tensor"),
        ({"a": {2: {3, 4}}}, r"value\['a'\]\[2\]: a set"),
        ({(1, 2): A}, r"dict key \(1, 2\)"),
        (Pair(A, lambda: 0), r"value\.second: a function"),
    ],
)
def test_what_cannot_be_taken_apart_is_named(value, message):
    with pytest.raises(InputError, match=message):
        flatten(value, torch.is_tensor)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:Thing", "cannot be imported"),
        ("os:system", "not a container class"),
        ("collections:Nothing", "cannot be imported"),
    ],
)
def test_only_container_classes_are_made(path, message):
    with pytest.raises(EngineError, match=message):
        unflatten({"dict": ["a"], "class": path, "items": [{"leaf": 0}]}, [A])
