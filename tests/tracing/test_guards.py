"""What a module decides about dynamic sizes holds for all of them, is checked at every call, or is refused."""

import dataclasses
import json
import logging
import math
import re
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import Call, compare
from test_tracing import module

from torch2rt import InputError, TraceError, TRTModule, lower, torch2rt, trace
from torch2rt.runtime.module import ReferenceModule


def _more_than_two(self, x):
    return x + 1 if x.shape[0] > 2 else x


def _exactly_one(self, x):
    return x + 1 if x.shape[0] == 1 else x


def _even(self, x):
    return x.reshape(2, x.shape[0] // 2, 3) if x.shape[0] % 2 == 0 else x


def _as_int(self, x):
    return torch.cat([x[i : i + 1] for i in range(x.shape[0])])


def _divisible(self, x):
    return x.view(2, -1, 3)


def _sevens(self, x):
    return x.view(7, -1, 3)


def _third(self, x):
    x = x.clone()
    x[1::3, torch.tensor([0])] *= -1
    return x


NARROWING = [
    (_more_than_two, r"test_guards.py:\d+.*x.shape\[0\] > 2.*false for x.shape\[0\] = 1"),
    (_exactly_one, r"x.shape\[0\] != 1.*false for x.shape\[0\] = 1"),
    (_even, r"false for x.shape\[0\] = 1"),
    (_as_int, r"x.shape\[0\] == \d.*from 1 to 4"),
    (_divisible, r"test_guards.py:\d+.*false for x.shape\[0\] = 1"),
    (_third, r"test_guards.py:\d+.*false for x.shape\[0\] = 1"),
]


@pytest.mark.parametrize(("forward", "message"), NARROWING, ids=lambda v: getattr(v, "__name__", ""))
def test_a_branch_that_narrows_the_range_is_refused(forward, message):
    with pytest.raises(TraceError, match=message):
        trace(module(forward), [torch.randn(4, 3)], max_batch_size=4)


@pytest.mark.parametrize("forward", [_more_than_two, _even], ids=lambda f: f.__name__)
def test_the_same_branch_is_fine_where_it_holds(forward):
    ranges = {"min_shapes": [(4, 3)], "max_shapes": [(4, 3)]}
    trace(module(forward), [torch.randn(4, 3)], **ranges)


def test_a_branch_that_always_goes_one_way_is_kept():
    trace(module(_more_than_two), [torch.randn(4, 3)], min_shapes=[(3, 3)], max_shapes=[(9, 3)])


def _mean(self, x):
    return x.sum(0) / x.shape[0] + x.new_ones(x.shape[1]).cumsum(0)


@pytest.mark.parametrize(
    ("ranges", "served"),
    [
        ({"max_batch_size": 1}, "[1, 8]"),
        ({"min_shapes": [(2, 4)], "opt_shapes": [(2, 4)], "max_shapes": [(2, 4)]}, "[2, 4]"),
        ({"min_shapes": [(3, 8)], "max_shapes": [(3, 8)]}, "[3, 8]"),
        ({"min_shapes": [(1, 4)], "max_shapes": [(6, 4)]}, "[1..6, 4]"),
        ({"min_shapes": [(5, 3)], "max_shapes": [(9, 4)]}, "[5..9, 3..4]"),
        ({"max_batch_size": 4, "max_shapes": [(4, 11)]}, "[1..4, 8..11]"),
        ({"max_batch_size": 4, "max_shapes": {}}, "[1..4, 8]"),
    ],
    ids=str,
)
def test_the_module_is_traced_at_the_sizes_that_are_served(ranges, served):
    """The example is of another size, static or dynamic: what Python does with a size is done with the engine's."""
    made = module(_mean)
    model_trt = torch2rt(made, [torch.randn(2, 8)], **ranges)
    (spec,) = model_trt.interface.inputs
    assert served in spec.describe()
    for shape in (spec.min, spec.opt, spec.max):
        x = torch.randn(shape)
        compare(model_trt.reference()(x), made(x))


def test_a_batch_of_one_from_an_example_of_two():
    made = torch.nn.Sequential(
        torch.nn.Conv2d(3, 5, 3), torch.nn.BatchNorm2d(5), torch.nn.Flatten(), torch.nn.Linear(80, 7)
    ).eval()
    model_trt = torch2rt(made, [torch.randn(2, 3, 6, 6)], max_batch_size=1)
    x = torch.randn(1, 3, 6, 6)
    compare(model_trt.reference()(x), made(x))


def test_a_kernel_choice_is_not_a_claim():
    # oneDNN picks its convolution by batch size, which must not limit the range.
    graph = trace(torch.nn.Conv2d(3, 5, 3).eval(), [torch.randn(2, 3, 8, 8)], max_batch_size=1000)
    assert graph.meta["torch2rt"].interface.constraints == []


def test_tied_dimensions_are_checked_at_every_call():
    made = module(lambda self, x, y: x + y)
    ranges = {"min_shapes": [(1, 3), (1, 3)], "max_shapes": [(4, 3), (8, 3)]}
    model_trt = torch2rt(made, [torch.randn(2, 3), torch.randn(2, 3)], **ranges)
    run = model_trt.reference()
    x, y = torch.randn(3, 3), torch.randn(3, 3)
    compare(run(x, y), x + y)
    with pytest.raises(InputError, match=r"needs [xy].shape\[0\] == [xy].shape\[0\], got x \(3, 3\), y \(2, 3\)"):
        run(x, y[:2])


def _first_rows(self, x, table):
    if x.shape[0] > table.shape[0]:
        raise ValueError("the table is too short")
    return x + table[: x.shape[0]]


def _wide(self, x, table):
    assert x.shape[1] * 2 >= table.shape[1] + 1
    return x.sum(1) + table.sum()


def _flat(self, x, table):
    return x.reshape(-1) + table.reshape(-1)


RELATIONS = [  # what the module raises an error without
    (
        _first_rows,
        [(1, 3), (1, 3)],
        [(2, 3), (5, 3)],
        [(8, 3), (9, 3)],
        "x.shape[0] <= table.shape[0]",
        [(4, 3), (4, 3)],
        [(5, 3), (4, 3)],
    ),
    (
        _wide,
        [(2, 3), (2, 3)],
        [(2, 5), (2, 4)],
        [(2, 9), (2, 9)],
        "2*x.shape[1] >= table.shape[1] + 1",
        [(2, 3), (2, 5)],
        [(2, 4), (2, 8)],
    ),
    (
        _flat,
        [(2, 4), (4, 2)],
        [(2, 6), (4, 3)],
        [(2, 16), (4, 8)],
        "2*x.shape[1] == 4*table.shape[1]",
        [(2, 10), (4, 5)],
        [(2, 10), (4, 6)],
    ),
]


@pytest.mark.parametrize(("forward", "low", "opt", "high", "text", "met", "unmet"), RELATIONS, ids=lambda v: "")
def test_relations_that_the_module_needs_are_shown_and_checked_at_calls(forward, low, opt, high, text, met, unmet):
    made = module(forward)
    model_trt = torch2rt(made, [torch.randn(s) for s in opt], min_shapes=low, opt_shapes=opt, max_shapes=high)
    assert f"; needs {text};" in repr(model_trt)
    run = model_trt.reference()
    for shapes in (low, opt, high, met):
        inputs = [torch.randn(shape) for shape in shapes]
        compare(run(*inputs), made(*inputs))
    with pytest.raises((ValueError, AssertionError, RuntimeError)):
        made(*[torch.randn(shape) for shape in unmet])
    with pytest.raises(InputError) as raised:
        run(*[torch.randn(shape) for shape in unmet])
    assert f"The model needs {text}, got x {unmet[0]}, table {unmet[1]}." in str(raised.value)


BRANCHES = [  # another relation, and the module does something else
    lambda self, x: x + 1 if x.shape[2] > x.shape[3] else x,
    lambda self, x: x.flatten(2)[:, :, : range(x.shape[2] * x.shape[3])[-1]],
    lambda self, x: x.sum() if x.shape[2] // 2 == x.shape[3] // 2 else x.mean(),
    lambda self, x: x.transpose(2, 3) if x.shape[2] * 2 < x.shape[3] * 3 and x.shape[2] > 5 else x * 1,
    lambda self, x: x.sum(2) if x.shape[2] - x.shape[3] in (4, 5) else x.sum(3),
]


@pytest.mark.parametrize("forward", BRANCHES, ids=range(len(BRANCHES)))
def test_a_branch_between_two_sizes_is_refused(forward):
    ranges = {"min_shapes": [(1, 3, 4, 4)], "opt_shapes": [(1, 3, 12, 8)], "max_shapes": [(1, 3, 16, 16)]}
    message = r"test_guards.py:\d+.*x.shape\[[23]\].*false for x.shape\[[23]\] = "
    with pytest.raises(TraceError, match=message) as raised:
        trace(module(forward), [torch.randn(1, 3, 12, 8)], **ranges)
    assert not re.search(r"\bs\d+\b|TruncToInt|ToFloat|FloorDiv|Mod\(|Eq\(|Max\(", str(raised.value))


ZERO = torch.zeros(1, dtype=torch.int64)
REFUSE_NOTHING = {  # torch's real kernels refuse a size of 0, and its fake ones do not
    "avg_pool2d": lambda x: F.avg_pool2d(x, (2, 1)),
    "max_pool2d": lambda x: F.max_pool2d(x, (2, 1)),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2.0),
    "interpolate to": lambda x: F.interpolate(torch.ones(1, 2, 4) + x.sum(), x.shape[3]),
    "conv2d": lambda x: F.conv2d(x, torch.ones(1, 2, 1, 1)),
    "topk": lambda x: x.topk(1, -1).values,
    "index_fill": lambda x: x.index_fill(-1, ZERO, 2.0),
    "index_put": lambda x: x.index_put((ZERO, ZERO, ZERO, ZERO), torch.ones(()), accumulate=True),
    "gather": lambda x: x.gather(-1, ZERO.expand(1, 2, 3, 1)),
    "pad": lambda x: F.pad(x, (0, -1)),
}


@pytest.mark.parametrize("name", REFUSE_NOTHING)
def test_calls_at_which_a_size_within_is_0_are_refused_where_torch_refuses_them(name):
    made = module(lambda self, x: REFUSE_NOTHING[name](x[..., : x.shape[3] % 5]))
    run = ReferenceModule(
        lower(trace(made, [torch.randn(1, 2, 3, 7)], min_shapes=[(1, 2, 3, 2)], max_shapes=[(1, 2, 3, 13)]))
    )
    for width in (2, 4, 5, 9, 10, 13):
        x = torch.randn(1, 2, 3, width)
        if width % 5:
            compare(run(x), made(x))
            continue
        with pytest.raises((RuntimeError, IndexError)):
            made(x)
        with pytest.raises(InputError, match="shape"):
            run(x)


def test_calls_at_which_a_size_within_is_too_small_are_refused_where_torch_refuses_them():
    made = module(lambda self, x: F.conv2d(x[..., : x.shape[3] % 5], torch.ones(1, 2, 1, 3)))
    ranges = {"min_shapes": [(1, 2, 3, 3)], "max_shapes": [(1, 2, 3, 14)]}
    run = torch2rt(made, [torch.randn(1, 2, 3, 8)], **ranges, verify=False).reference()
    for width in (3, 9, 13, 14):
        x = torch.randn(1, 2, 3, width)
        compare(run(x), made(x))
    for width in (5, 6, 7, 12):
        with pytest.raises(InputError, match="shape"):
            run(torch.randn(1, 2, 3, width))


def test_what_lowering_asks_of_sizes_is_not_answered_for_the_traced_ones():
    """A slice that is empty at the traced size, and not at another one."""
    made = module(lambda self, x: x[:, : -x.shape[0] % 2] * 2)
    run = ReferenceModule(lower(trace(made, [torch.randn(2, 3, 5)], min_shapes=[(1, 3, 2)], max_shapes=[(2, 3, 7)])))
    for shape in [(1, 3, 2), (2, 3, 7), (1, 3, 5)]:
        x = torch.randn(shape)
        compare(run(x), made(x))


@pytest.mark.parametrize(
    ("read", "least"), [(lambda x: x[..., 5] * 2, 6), (lambda x: x.select(1, -4), 4)], ids=["getitem", "select"]
)
def test_calls_are_refused_that_lack_a_place_which_the_module_reads(read, least):
    if least == 4 and int(torch.__version__.split(".")[1]) < 12:
        pytest.skip("this torch asks nothing there, so the conversion is refused")
    made = module(lambda self, x: read(x))
    graph = trace(made, [torch.randn(3, 7)], min_shapes=[(1, 2)], max_shapes=[(4, 9)])
    run = ReferenceModule(lower(graph))
    for rows, columns in [(1, least), (4, 9)]:
        x = torch.randn(rows, columns)
        compare(run(x), made(x))
    x = torch.randn(2, least - 1)
    with pytest.raises(IndexError):
        made(x)
    with pytest.raises(InputError, match=rf"{least}"):
        run(x)


def _distances(rows, columns):
    """Places in a table, of floats that Python rounds to float32 once; rounded at each step, some are one too low."""
    fewer, more = max(columns / rows, 1.0), max(rows / columns, 1.0)
    places = torch.arange(rows).unsqueeze(-1) * fewer - torch.arange(columns).unsqueeze(0) * more
    return (places + (columns - 1) * more).long()


OF_SIZES = [  # Python's functions of numbers, which give another size
    lambda self, x: x.amax((2, 3)) / max(x.shape[2], x.shape[3]),
    lambda self, x: x.amax((2, 3)) * min(x.shape[2:]) + max(3, x.shape[2] // 2, x.shape[3]),
    lambda self, x: x[..., : divmod(x.shape[2], 3)[0] + 1] * divmod(x.shape[3], 5)[1],
    lambda self, x: x[:, :, : math.isqrt(x.shape[2])] * math.hypot(*x.shape[2:]) + math.log2(x.shape[2]),
    lambda self, x: x[:, :, : math.floor(math.log2(x.shape[2]))] * math.ceil(x.shape[3] / 3),
    lambda self, x: x[..., : max(len(x.shape), 2)] * min([len(x), 2.5], key=lambda n: -n),
    lambda self, x: x * (math.log(x.shape[2]) / math.log(512)) + math.exp(-x.shape[3] / 7) * math.log(x.shape[2], 3),
    lambda self, x: x[..., : int(math.log10(1000 * x.shape[3]))] * math.sin(x.shape[2]) * math.pow(x.shape[3], -0.3),
    lambda self, x: x / math.log(x.shape[2] * x.shape[3]) * (math.exp(x.shape[2] * 40) / math.exp(x.shape[2] * 40 - 1)),
    lambda self, x: F.scaled_dot_product_attention(x, x, x, scale=math.log(x.shape[2]) / math.sqrt(x.shape[3])),
    lambda self, x: x[..., : int(np.ceil(x.shape[3] / 3))] * np.sqrt(x.shape[2]) + np.exp(-np.log2(x.shape[3])),
    lambda self, x: x.int() * np.ceil(x.shape[2] / 5) + (x.shape[2] & 6) * x.shape[2].bit_length() + (x.shape[3] ^ 1),
    lambda self, x: x * max(n + 1 for n in x.shape) + abs(x.shape[2] - 2 * x.shape[3]) * round(x.shape[2] / 3, 1),
    lambda self, x: x + _distances(x.shape[2], x.shape[3]).sum(),
    lambda self, x: x + _distances(x.shape[2], (2 * x.shape[2] + 2) // 3).sum(),
]


@pytest.mark.parametrize("forward", OF_SIZES, ids=range(len(OF_SIZES)))
def test_functions_of_sizes_are_no_branches(forward):
    ranges = {"min_shapes": [(2, 3, 4, 3)], "opt_shapes": [(2, 3, 12, 8)], "max_shapes": [(2, 3, 16, 17)]}
    made = module(forward)
    run = torch2rt(made, [torch.randn(2, 3, 12, 8)], **ranges, verify=False).reference()
    for sizes in [(4, 3), (9, 10), (16, 17), (4, 17), (15, 3), (8, 7), (11, 10)]:
        x = torch.randn(2, 3, *sizes)
        compare(run(x), made(x))


def test_a_branch_between_sizes_that_always_goes_one_way():
    ranges = {"min_shapes": [(1, 3, 10, 4)], "opt_shapes": [(1, 3, 12, 8)], "max_shapes": [(1, 3, 16, 9)]}
    for forward in (BRANCHES[0], *OF_SIZES[:6]):
        made = module(forward)
        model_trt = torch2rt(made, [torch.randn(1, 3, 12, 8)], **ranges)
        assert "needs" not in repr(model_trt)
        for shape in (ranges["min_shapes"][0], (1, 3, 11, 5), ranges["max_shapes"][0]):
            x = torch.randn(shape)
            compare(model_trt.reference()(x), made(x))


def test_ranges_that_cannot_meet_are_refused():
    made = module(lambda self, x, y: x + y)
    ranges = {"min_shapes": [(1, 3), (5, 3)], "opt_shapes": [(2, 3), (5, 3)], "max_shapes": [(4, 3), (8, 3)]}
    with pytest.raises((TraceError, RuntimeError), match=r"nothing in common|must match"):
        trace(made, [torch.randn(2, 3), torch.randn(2, 3)], **ranges)


def _skip(self, x):
    """A U-Net of two levels: what comes up has the size of what went down only for multiples of 4."""
    down = torch.nn.functional.avg_pool2d(x, 2)
    deep = torch.nn.functional.interpolate(torch.nn.functional.max_pool2d(down, 2), scale_factor=2)
    return torch.cat([torch.nn.functional.interpolate(torch.cat([deep, down], 1), scale_factor=2), x], 1)


def _raising(self, x):
    if x.shape[2] % 4 or x.shape[3] % 4:
        raise ValueError("sizes must be multiples of 4")
    return x.unflatten(3, (4, -1)).amax(2)


STEPS = {"min_shapes": [(1, 2, 4, 8)], "opt_shapes": [(2, 2, 8, 12)], "max_shapes": [(3, 2, 24, 16)]}


@pytest.mark.parametrize("forward", [_skip, _raising], ids=lambda f: f.__name__)
def test_sizes_that_the_module_itself_refuses_are_refused_at_calls(forward, device):
    made = module(forward)
    model_trt = torch2rt(made, [torch.randn(2, 2, 8, 12, device=device)], **STEPS)
    for axis in (2, 3):
        assert f"; needs x.shape[{axis}] to be a multiple of 4" in str(model_trt)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for sizes in [(1, 4, 8), (2, 20, 12), (3, 24, 16)]:
        x = torch.randn(sizes[0], 2, *sizes[1:], device=device)
        compare(run(x), made(x))
    for sizes, axis in [((1, 6, 8), 2), ((2, 20, 13), 3), ((3, 23, 14), 2)]:
        x = torch.randn(sizes[0], 2, *sizes[1:], device=device)
        with pytest.raises((RuntimeError, ValueError)):
            made(x)
        with pytest.raises(InputError, match=rf"needs x.shape\[{axis}\] to be a multiple of 4, got x \("):
            run(x)


def test_steps_are_saved_with_the_engine():
    model_trt = torch2rt(module(_skip), [torch.randn(2, 2, 8, 12)], **STEPS)
    loaded = TRTModule()
    loaded.load_state_dict(model_trt.state_dict())
    with pytest.raises(InputError, match=r"needs x.shape\[3\] to be a multiple of 4"):
        loaded.interface.check([(1, 2, 8, 10)], [torch.float32])
    loaded.interface.check([(1, 2, 8, 16)], [torch.float32])


def test_steps_of_tied_dimensions_are_those_of_both():
    made = module(lambda self, image, mask: self.inner(image * mask))
    made.inner = module(_skip)
    ranges = {name: [shapes[0], (1, 1, *shapes[0][2:])] for name, shapes in STEPS.items()}
    run = torch2rt(made, [torch.randn(2, 2, 8, 12), torch.randn(1, 1, 8, 12)], **ranges).reference()
    inputs = torch.randn(2, 2, 20, 16), torch.randn(1, 1, 20, 16)
    compare(run(*inputs), made(*inputs))
    with pytest.raises(InputError, match="to be a multiple of 4"):
        run(torch.randn(2, 2, 10, 16), torch.randn(1, 1, 10, 16))


@pytest.mark.parametrize(
    ("forward", "ranges", "message"),
    [
        (_even, [(2, 3), (4, 3), (6, 3)], r"false for x.shape\[0\] = [23]"),  # odd sizes mean something else
        (_divisible, [(2, 3), (4, 3), (7, 3)], r"false for x.shape\[0\] = 3"),  # a range ends in one
        (_divisible, [(3, 3), (4, 3), (8, 3)], r"false for x.shape\[0\] = 3"),
    ],
    ids=["both-ways", "max", "min"],
)
def test_other_gaps_in_a_range_are_refused(forward, ranges, message):
    names = ("min_shapes", "opt_shapes", "max_shapes")
    with pytest.raises(TraceError, match=message):
        trace(module(forward), [torch.randn(4, 3)], **{name: [shape] for name, shape in zip(names, ranges)})


def test_steps_over_a_range_too_long_to_look_at_all_of_it():
    ranges = {"min_shapes": [(6, 3)], "opt_shapes": [(12, 3)], "max_shapes": [(60000, 3)]}
    made = module(lambda self, x: x.view(2, -1, 3).sum(0).view(3, -1, 3))
    interface = trace(made, [torch.randn(12, 3)], **ranges).meta["torch2rt"].interface
    for size in (18, 30012, 59994):
        interface.check([(size, 3)], [torch.float32])
    for size in (8, 9, 30011, 59998):
        with pytest.raises(InputError, match="needs"):
            interface.check([(size, 3)], [torch.float32])


def test_the_step_of_a_range_is_not_that_of_the_sizes_looked_at():
    """Of a very long range every 14th size is looked at, and all multiples of 7 among those are of 14."""
    ranges = {"min_shapes": [(14, 3)], "opt_shapes": [(28, 3)], "max_shapes": [(14 * 65535, 3)]}
    interface = trace(module(_sevens), [torch.randn(14, 3)], **ranges).meta["torch2rt"].interface
    interface.check([(21, 3)], [torch.float32])
    with pytest.raises(InputError, match=r"needs .*x.shape\[0\] % 7"):
        interface.check([(22, 3)], [torch.float32])


def test_what_a_module_refuses_leaves_no_trace(caplog):
    """Neither in the log, where torch writes down what its fake tensors raise, nor in the module."""
    made = module(_skip)
    made.calls = []
    made.register_forward_pre_hook(lambda self, args: self.calls.append(tuple(args[0].shape)))
    trace(made, [torch.randn(2, 2, 8, 12)], **STEPS)
    assert made.calls == []
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


class Mixed(torch.nn.Module):
    """Sizes, floor division, slices and reshapes over two dynamic dimensions."""

    def forward(self, x):
        batch, length, width = x.shape
        half = length // 2
        first, second = x[:, :half], x[:, length - half :]
        folded = (first * batch + second).view(batch * half, width)
        flat = x.view(-1, width * 2 // 2)
        return folded, flat.reshape(batch, -1), torch.relu(x[:, 1:]) + x[:, :-1], batch * half


@pytest.mark.parametrize("made", [Mixed()], ids=["mixed"])
def test_arithmetic_on_two_dynamic_dimensions(made, device):
    ranges = {"min_shapes": [(1, 4, 6)], "opt_shapes": [(2, 9, 6)], "max_shapes": [(5, 16, 6)]}
    model_trt = torch2rt(made, [torch.randn(2, 9, 6, device=device)], **ranges)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for batch, length in [(1, 4), (2, 9), (3, 7), (4, 12), (5, 16)]:
        x = torch.randn(batch, length, 6, device=device)
        compare(run(x), made(x))


def test_a_size_that_tensorrt_knows_better_is_checked_at_every_call():
    """Halves of a joined batch are as long as its parts only if the parts are equally long, which the sum asks for."""

    def forward(self, x, y):
        first, second = torch.cat([x, y]).chunk(2)
        grown = (first + x).reshape(x.shape[0], -1, 3)
        return grown + torch.ones(2, 3, device=x.device), second

    made = module(forward)
    ranges = {"min_shapes": [(1, 2, 3)] * 2, "max_shapes": [(4, 2, 3)] * 2}
    run = torch2rt(made, [torch.randn(2, 2, 3), torch.randn(2, 2, 3)], **ranges).reference()
    for batch in (1, 3):
        x, y = torch.randn(batch, 2, 3), torch.randn(batch, 2, 3)
        compare(run(x, y), made(x, y))
    with pytest.raises(InputError, match="The model needs"):
        run(torch.randn(1, 2, 3), torch.randn(3, 2, 3))


def test_sizes_that_are_rounded_again_and_again_are_refused_in_time():
    """As Swin's over a range of images: without a limit, its trace takes torch longer than anyone waits."""

    def forward(self, x):
        n = x.shape[1]
        for i in range(2, 11):
            n = (n + i) // 3 + (n * i + 1) // 2
        return x * 2 if n % 2 == 0 else x

    start = time.process_time()
    with pytest.raises(TraceError, match=r"test_guards.py:\d+: the module rounds sizes again.*more than 1000 terms"):
        trace(module(forward), [torch.randn(2, 3)], max_shapes=[(2, 9)])
    assert time.process_time() - start < 10


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact", "bilinear"])
def test_the_memory_format_that_torch_chooses_on_a_gpu_is_no_claim(mode):
    """DETR resizes a mask whose channels are the batch. Tracing a tensor of a GPU needs none."""

    def forward(self, x):
        y = torch.zeros(1, x.shape[0], 8, 8, device="cuda")
        return x + torch.nn.functional.interpolate(y, size=(4, 4), mode=mode).to("cpu")[0]

    graph = trace(module(forward), [torch.randn(2, 4, 4)], min_shapes=[(1, 4, 4)], max_shapes=[(20, 4, 4)])
    assert not graph.meta["torch2rt"].interface.constraints


def test_lowering_twice_gives_two_equal_networks_and_leaves_the_graph_alone():
    made = module(lambda self, x, y: x.narrow(0, 0, y.shape[0]) * 2)
    ranges = {"min_shapes": [(2, 3), (1, 3)], "max_shapes": [(4, 3), (4, 3)]}
    graph = trace(made, [torch.randn(3, 3), torch.randn(2, 3)], **ranges)
    before = json.dumps(graph.meta["torch2rt"].interface.to_json())
    first, second = lower(graph), lower(graph)
    assert json.dumps(graph.meta["torch2rt"].interface.to_json()) == before
    assert len(first.interface.constraints) > len(graph.meta["torch2rt"].interface.constraints)
    assert first.facts() == second.facts() and first.interface == second.interface
    assert first.weights.keys() == second.weights.keys()
    for name, weight in first.weights.items():
        assert torch.equal(weight.tensor, second.weights[name].tensor) and weight.origin == second.weights[name].origin


def test_an_interface_does_not_change():
    graph = trace(module(lambda self, x: x + 1), [torch.randn(2, 3)])
    interface = graph.meta["torch2rt"].interface
    with pytest.raises(dataclasses.FrozenInstanceError):
        interface.outputs = ["y"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        interface.inputs[0].min = (1, 3)


def test_the_smaller_of_two_sizes_within_torch_is_a_size():
    """Before 2.12, torch's own functions for shapes take Python's `min`, which would ask which one is smaller."""
    module = Call(lambda x: torch.linalg.svdvals(x.T[:3]))
    graph = trace(module, [torch.randn(7, 6)], min_shapes=[(1, 6)], max_shapes=[(9, 6)], fallback=True)
    (output,) = graph.graph.find_nodes(op="output")
    (size,) = output.args[0][0].meta["val"].shape
    assert str(size).startswith("Min(3, ")


def test_a_rounded_size_is_not_rewritten_as_if_all_sizes_were_at_least_2():
    made = module(lambda self, x: x * math.floor(max(x.shape[0], 2) * 0.6) + math.ceil(max(x.shape[0], 2) / 3))
    run = ReferenceModule(lower(trace(made, [torch.randn(3, 4)], min_shapes=[(1, 4)], max_shapes=[(4, 4)])))
    for rows in (1, 2, 3, 4):
        x = torch.randn(rows, 4)
        compare(run(x), made(x))
