"""Fake kernels of element-wise calls, beside torch's own: the same sizes, strides and types, and no question asked."""

import itertools

import pytest
import torch
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torch2rt.tracing.patches.fake_kernels import KERNELS, elementwise, to_copy
from torch2rt.tracing.patches.fake_mode import FakeMode

aten = torch.ops.aten
LAYOUTS = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "channels last": lambda x: x.permute(0, 2, 1).contiguous().permute(0, 2, 1),
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "sliced": lambda x: x[..., 1:],
    "of one": lambda x: x[:, :1],
}
OTHERS = {
    "the same": lambda x: x,
    "dense": lambda x: x.clone(memory_format=torch.contiguous_format),
    "a row": lambda x: x[0, 0].clone(),
    "a column": lambda x: x.sum(2, keepdim=True).to(x.dtype),
    "a number": lambda x: x[0, 0, 0],
    "a real number": lambda x: torch.tensor(3, dtype=x.dtype),
    "an integer": lambda x: torch.ones((), dtype=torch.int64),
    "another type": lambda x: x.clone().to(torch.float64),
}
DTYPES = (torch.float32, torch.uint8, torch.bool)


@pytest.fixture
def mode():
    return FakeMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


@pytest.fixture
def x(mode):
    dynamic = [DimDynamic.DYNAMIC, DimDynamic.STATIC, DimDynamic.DYNAMIC]
    context = StatelessSymbolicContext(dynamic_sizes=dynamic)
    return mode.from_tensor(torch.rand(6, 5, 7), symbolic_context=context)


def facts(tensor):
    sizes = [getattr(getattr(s, "node", None), "expr", s) for s in (*tensor.shape, *tensor.stride())]
    return sizes, tensor.dtype, tensor.device, tensor.storage_offset()


def arguments(func, x, other):
    """Arguments by a function's schema: tensors, and numbers where it wants some."""
    found, tensors = [], [x, other, other]
    for argument in func._schema.arguments:
        kind = str(argument.type)
        if argument.kwarg_only:
            break
        if func is aten.where.self and not found:
            found.append(x > 0)
        elif kind == "Tensor" or (kind == "Optional[Tensor]" and len(found) < 2):
            found.append(tensors.pop(0))
        elif kind in ("number", "Optional[number]") and (not argument.has_default_value() or "clamp" in str(func)):
            found.append(2)
        else:
            break
    return tuple(found)


def compare(mode, func, args, kwargs=None):
    """Whether the kernel took the call; where it did, torch's own says the same, and does not refuse it."""
    kwargs = dict(kwargs or {})
    if str(func).endswith("_mode"):
        kwargs["rounding_mode"] = "floor"
    before = len(mode.shape_env.guards)
    ours = KERNELS[func](mode, func, args, kwargs)
    assert len(mode.shape_env.guards) == before
    if ours is NotImplemented:
        return False
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        theirs = super(FakeMode, mode).__torch_dispatch__(func, (), args, kwargs)
    assert facts(ours) == facts(theirs), (func, args)
    return True


@pytest.mark.parametrize("func", sorted((f for f in KERNELS if KERNELS[f] is elementwise), key=str), ids=str)
def test_functions(mode, x, func):
    with mode:
        taken = [compare(mode, func, arguments(func, one, one)) for one in map(x.to, DTYPES)]
    assert any(taken), "torch makes all of its calls"


@pytest.mark.parametrize(("layout", "other"), list(itertools.product(LAYOUTS, OTHERS)))
def test_layouts(mode, x, layout, other):
    taken = set()
    with mode:
        one = LAYOUTS[layout](x)
        two = OTHERS[other](one)
        for func in (aten.mul.Tensor, aten.where.self):
            for args in (arguments(func, one, two), arguments(func, two, one)):
                taken.add(compare(mode, func, args))
    if layout in ("transposed", "channels last"):
        assert taken == {other in ("the same", "a number", "a real number", "an integer")}
    else:
        assert taken == {layout == "contiguous" and other != "another type"}


def test_what_is_left_to_torch(mode, x):
    with mode:
        static = torch.empty(3, 4)
        for func, args in (
            (aten.sin.default, (static,)),
            (aten.clamp.default, (x, None, None)),
            (aten.clamp.default, (x,)),
            (aten.add.Tensor, (x.long(), 2.5)),
            (aten.add.Tensor, (x, 2j)),
            (aten.clone.default, (torch.view_as_complex(x.new_empty(x.shape[0], 2)),)),
            (aten._to_copy.default, (static,)),
        ):
            assert KERNELS[func](mode, func, args, {}) is NotImplemented
        assert to_copy(mode, aten._to_copy.default, (x,), {"dtype": torch.half, "device": "cpu"}) is NotImplemented
        for name, layout in LAYOUTS.items():
            is_taken = compare(mode, aten._to_copy.default, (layout(x),), {"dtype": torch.float16})
            assert is_taken == (name in ("contiguous", "transposed", "channels last"))


VIEWS = [
    (lambda n, m: [n, -1], True),
    (lambda n, m: [-1, m], True),
    (lambda n, m: [n * 5, m], True),
    (lambda n, m: [n, m * 5], True),
    (lambda n, m: [-1], True),
    (lambda n, m: [1, n, 1, 5, m, 1], True),
    (lambda n, m: [n, -1, m], True),
    (lambda n, m: [n * m, 5], True),
    (lambda n, m: [n, 5, -1, 7], False),  # where torch asks whether 7 divides it
    (lambda n, m: [30, -1], False),
    (lambda n, m: [6, 5, 7], False),
]


@pytest.mark.parametrize("func", [aten.view.default, aten._unsafe_view.default], ids=str)
@pytest.mark.parametrize(("sizes", "is_taken"), VIEWS)
def test_views(mode, x, func, sizes, is_taken):
    n, _, m = x.shape
    assert compare(mode, func, (x, sizes(n, m))) == is_taken
    assert not compare(mode, func, (x.transpose(0, 2), sizes(m, n)))
    if is_taken and func is aten.view.default:
        made = KERNELS[func](mode, func, (x, sizes(n, m)), {})
        assert made.untyped_storage()._cdata == x.untyped_storage()._cdata
