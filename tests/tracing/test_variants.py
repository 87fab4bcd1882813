"""A range over which a module takes several paths is covered by graphs that are each right for a part of it."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import InputError, TraceError, UnsupportedError, lower, torch2rt, trace
from torch2rt.graph import check_graph, graph_meta
from torch2rt.runtime.module import ReferenceModule
from torch2rt.tracing.trace import Traces, trace_variants


def variants_of(forward, inputs, max_variants=8, **ranges):
    made = forward if isinstance(forward, torch.nn.Module) else module(forward)
    with Traces(made, inputs, **ranges) as traces:
        return made, trace_variants(traces, max_variants)


def all_shapes(low, high):
    return itertools.product(*(range(first, last + 1) for first, last in zip(low, high, strict=True)))


def check_coverage(forward, low, high, count, example=(3, 5), max_variants=8):
    """Every size of a range belongs to a graph, whose result is the module's; there are `count` graphs."""
    made, variants = variants_of(forward, [torch.randn(example)], max_variants, min_shapes=[low], max_shapes=[high])
    assert len(variants) == count
    for variant in variants:
        check_graph(variant.graph)
        assert graph_meta(variant.graph).splits == ()
    interfaces = [graph_meta(variant.graph).interface for variant in variants]
    for interface in interfaces:
        assert interface.serves([interface.inputs[0].opt])
    for shape in all_shapes(low, high):
        x = torch.randn(shape)
        serving = [i for i, interface in enumerate(interfaces) if interface.serves([shape])]
        assert len(serving) == 1, (shape, serving)
        graph, interface = variants[serving[0]].graph, interfaces[serving[0]]
        compare(interface.wrap(graph(x), [shape]), made(x))
    return variants


def _parity(self, x):
    return F.pad(x, (0, 1)) if x.shape[1] % 2 else x * 2


def _order(self, x):
    if x.shape[0] == 1:
        return x + 1
    return x * 2 if x.shape[0] > x.shape[1] else x * 3


def _two_parities(self, x):
    x = x * 3 if x.shape[0] % 2 else x
    return x + 1 if x.shape[1] % 2 else x


def _product(self, x):
    return x + 1 if x.shape[0] * x.shape[1] == 12 else x


def _square(self, x):
    return x @ x if x.shape[0] == x.shape[1] else x * 2


def _as_int(self, x):
    return torch.cat([x[i : i + 1] * i for i in range(x.shape[0])])


def _half(self, x):
    return x[: len(range(x.shape[0] // 2))]


def _other_result(self, x):
    return (x, x.sum(0)) if x.shape[1] > 5 else x.sum(1)


@pytest.mark.parametrize(
    ("forward", "low", "high", "count"),
    [
        (_parity, (1, 1), (4, 9), 2),
        (_order, (1, 1), (6, 7), 3),
        (_two_parities, (1, 1), (5, 7), 4),
        (_product, (1, 1), (7, 13), 2),
        (_square, (1, 1), (5, 6), 2),
        (_as_int, (1, 5), (4, 5), 4),
        (_half, (1, 5), (9, 6), 5),
        (_other_result, (1, 2), (3, 8), 2),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_paths_cover_the_range(forward, low, high, count):
    check_coverage(forward, low, high, count)


def _cut_by_another(self, x):
    """Sizes at which the slice cuts off, and at which it does not: torch asks itself, not the module."""
    rows = x.new_zeros(x.shape[1] % 3 + 1, x.shape[1]) + x.sum(0)
    return rows[: x.shape[0]]


def test_a_slice_that_another_size_cuts_off():
    made, variants = variants_of(_cut_by_another, [torch.randn(3, 5)], min_shapes=[(1, 1)], max_shapes=[(4, 7)])
    for shape in all_shapes((1, 1), (4, 7)):
        x = torch.randn(shape)
        serving = [v for v in variants if graph_meta(v.graph).interface.serves([shape])]
        assert serving, shape
        for variant in serving:
            compare(variant.graph(x)[0], made(x))


def _six_questions(self, x):
    y = x * 2 if x.shape[0] % 2 else x + 1
    if x.shape[0] > x.shape[1]:
        y = y.sum(0, keepdim=True)
    if x.shape[0] == x.shape[1]:
        y = y.t()
    if x.shape[0] * x.shape[1] == 12:
        y = y - 3
    if x.shape[1] == self.table.shape[0]:
        y = y + self.table
    return y / 2 if x.shape[0] + x.shape[1] < 6 else y


def test_six_questions_of_two_sizes():
    forward = module(_six_questions, table=torch.randn(4))
    check_coverage(forward, (1, 1), (7, 7), 24, max_variants=30)


def test_the_texts_say_where_the_range_is_split():
    variants = check_coverage(_parity, (1, 1), (4, 9), 2)
    assert {variant.text for variant in variants} == {"x.shape[1] % 2 == 0", "x.shape[1] % 2 != 0"}
    assert all("test_variants.py:" in variant.line for variant in variants)


def _raises_between(self, x):
    if x.shape[0] == 3:
        raise ValueError("three")
    return x * 2 if x.shape[0] > 4 else x


def test_sizes_that_the_module_refuses_are_not_served():
    _, variants = variants_of(_raises_between, [torch.randn(5, 2)], min_shapes=[(1, 2)], max_shapes=[(6, 2)])
    interfaces = [graph_meta(variant.graph).interface for variant in variants]
    served = [[rows for rows in range(1, 7) if interface.serves([(rows, 2)])] for interface in interfaces]
    assert sorted(served) == [[1, 2, 4], [5, 6]]


def _raises_at_the_end(self, x):
    if x.shape[0] > 5:
        raise ValueError("too long")
    return x * 2 if x.shape[0] > 3 else x


def test_a_range_whose_end_the_module_refuses_promises_too_much():
    with pytest.raises(TraceError, match=r"x.shape\[0\] <= 5.*Narrow the range"):
        variants_of(_raises_at_the_end, [torch.randn(5, 2)], min_shapes=[(1, 2)], max_shapes=[(8, 2)])


def test_too_many_paths_are_listed_with_ways_out():
    with pytest.raises(TraceError) as caught:
        variants_of(_half, [torch.randn(4, 5)], max_shapes=[(30, 5)], min_shapes=[(1, 5)], max_variants=3)
    text = str(caught.value)
    assert "more than 3 engines" in text
    assert text.count("test_variants.py:") == 3  # no more are traced: each size needs an engine
    for word in ("range(size)", "size // 2", "max_variants", "shapes=["):
        assert word in text
    check_coverage(lambda self, x: x[: torch.sym_int(x.shape[0] * 0.5)], (2, 5), (9, 6), 1)


def _added(self, x, y):
    return x + y if x.shape[0] % 2 else x - y


def test_tied_dimensions_go_together():
    inputs = [torch.randn(3, 2), torch.randn(3, 2)]
    ranges = {"min_shapes": [(2, 2)] * 2, "max_shapes": [(7, 2)] * 2}
    made, variants = variants_of(_added, inputs, **ranges)
    assert len(variants) == 2
    for rows in range(2, 8):
        x, y = torch.randn(rows, 2), torch.randn(rows, 2)
        (serving,) = [v for v in variants if graph_meta(v.graph).interface.serves([x.shape, y.shape])]
        compare(serving.graph(x, y)[0], made(x, y))
    assert not any(graph_meta(v.graph).interface.serves([(4, 2), (5, 2)]) for v in variants)


def _special_batch_and_size(self, x, y):
    if x.shape[0] != 1:
        y = y * 1
    x = x * 2 if x.shape[1] % 2 or x.shape[2] % 2 else x * 3
    return (x + 1 if x.shape[1] == 224 and x.shape[2] == 224 else x) * y[:, None, None]


def test_a_range_that_is_sampled_is_covered_exactly():
    """Not all of 4 x 269 x 269 sizes are looked at: what an engine serves must follow from its claims alone."""
    inputs = [torch.randn(2, 64, 48), torch.randn(2)]
    ranges = {"min_shapes": [(1, 32, 32), (1,)], "max_shapes": [(4, 300, 300), (4,)]}
    made, variants = variants_of(_special_batch_and_size, inputs, 16, **ranges)
    interfaces = [graph_meta(variant.graph).interface for variant in variants]
    drawn = torch.randint(32, 301, (40, 2), generator=torch.Generator().manual_seed(3)).tolist()
    for rows, (height, width) in enumerate([(224, 224), (224, 224), (32, 300), (224, 226), (225, 224), *drawn]):
        x, y = torch.randn(rows % 3 + 1, height, width), torch.randn(rows % 3 + 1)
        shapes = [tuple(x.shape), tuple(y.shape)]
        (serving,) = [i for i, interface in enumerate(interfaces) if interface.serves(shapes)]
        compare(variants[serving].graph(x, y)[0], made(x, y))
    for shapes in ([(2, 64, 64), (3,)], [(4, 224, 224), (1,)], [(3, 224, 50), (2,)]):
        assert not any(interface.serves(shapes) for interface in interfaces)


# Merging --------------------------------------------------------------------------------------------------------------


def _expands_table(self, x):
    table = self.table
    if x.shape[0] != table.shape[0]:
        table = table.expand(x.shape[0], -1)
    return x + table


def _flattens_one(self, x):
    if x.shape[0] == 1:
        return (x.reshape(-1) @ self.weight)[None]
    return torch.einsum("bi,ij->bj", x, self.weight)


def _differs_at_one(self, x):
    return x * 1.001 if x.shape[0] == 1 else x


def _resized_table(self, x):
    table = self.weight[None, None]
    if x.shape[-2:] != table.shape[-2:]:
        table = F.interpolate(table, size=x.shape[-2:], mode="bicubic")
    return x + table


MERGED = [
    (
        module(_expands_table, table=torch.randn(1, 5)),
        (2, 5),
        (1, 5),
        (4, 5),
        1,
        "the calls are the same where x.shape[0] == 1",
    ),
    (
        module(_flattens_one, weight=torch.randn(5, 7)),
        (2, 5),
        (1, 5),
        (4, 5),
        1,
        "verified by values at x.shape[0] == 1",
    ),
    (module(_differs_at_one), (2, 5), (1, 5), (4, 5), 2, "variant 1: x.shape[0] == 1"),
    (module(_resized_table, weight=torch.randn(4, 6)), (2, 3, 5, 5), (1, 3, 3, 3), (2, 3, 5, 7), 1, "x.shape[2] == 4"),
]


@pytest.mark.parametrize(
    ("made", "example", "low", "high", "count", "how"), MERGED, ids=["expand", "flatten", "differs", "table"]
)
def test_paths_with_the_same_values_are_one_engine(made, example, low, high, count, how):
    model_trt = torch2rt(made, [torch.randn(example)], min_shapes=[low], max_shapes=[high], verify=False)
    assert len(model_trt.built.each()) == count
    assert how in str(model_trt.report)
    run = model_trt.reference()
    for shape in all_shapes(low, high):
        x = torch.randn(shape)
        torch.testing.assert_close(run(x), made(x), rtol=1e-4, atol=1e-5)


def test_merge_by_proof_does_not_compare_values():
    made = module(_flattens_one, weight=torch.randn(5, 7))
    model_trt = torch2rt(made, [torch.randn(2, 5)], max_batch_size=4, merge="proof", verify=False)
    assert len(model_trt.built.each()) == 2
    assert "by values" not in str(model_trt.report)


def test_a_slice_beyond_the_end_is_not_the_same_in_an_engine():
    """At 4 rows the graph of 4 rows gives the same as the module for fewer, as torch cuts slices off."""
    made = module(lambda self, x: torch.cat([x[i : i + 1] for i in range(x.shape[0])]))
    model_trt = torch2rt(made, [torch.randn(3, 5)], max_batch_size=3, verify=False)
    run = model_trt.reference()
    for rows in (1, 2, 3):
        x = torch.randn(rows, 5)
        compare(run(x), made(x))


# Numbers made of sizes ------------------------------------------------------------------------------------------------


def _square(self, x):
    side = int(x.shape[1] ** 0.5)
    return x[:, : side * side].reshape(-1, side, side) * float(x.shape[0])


def _kernel(self, x):
    return F.conv1d(x[None], torch.ones(1, x.shape[0], int(x.shape[1] * 0.5)))


def _is_whole(self, x):
    half = int(x.shape[1] / 2)
    return x * 3 if isinstance(half, int) and not isinstance(half, float) and issubclass(bool, int) else x


def _is_int(self, x):
    return x * int(x.shape[1] * 0.5) if type(x.ndim) is int else x


def _of_type(self, x):
    return x[:, : int(x.shape[1] * 0.5)].to(int)


NUMBERS = [(_square, 1), (_kernel, 3), (_is_whole, 1), (_is_int, 3), (_of_type, 3)]


@pytest.mark.parametrize(("forward", "count"), NUMBERS, ids=[forward.__name__ for forward, _ in NUMBERS])
def test_int_of_a_size_is_a_size_where_that_will_do(forward, count):
    made, sizes = module(forward), (4, 5, 6, 7, 9)
    ranges = {"min_shapes": [(2, 4)], "max_shapes": [(2, 9)], "opt_shapes": [(2, 7)]}
    model_trt = torch2rt(made, [torch.randn(2, 7)], **ranges, verify=False)
    assert len(model_trt.built.each()) == count
    run = model_trt.reference()
    for size in sizes:
        x = torch.randn(2, size) * 5
        compare(run(x), made(x))
    assert "int" not in globals()


PRODUCTS = [
    lambda self, x: x * int((x.shape[0] * x.shape[1]) ** 0.5),
    lambda self, x: x * math.isqrt(x.shape[0] // 2 * x.shape[1]) + math.floor(math.log2(x.shape[0] + x.shape[1])),
    lambda self, x: x * int(x.shape[0] / x.shape[1] * 7) + math.ceil(x.shape[0] * x.shape[1] * 0.1),
]


@pytest.mark.parametrize("forward", PRODUCTS, ids=["root", "functions", "quotient"])
def test_rounded_floats_of_several_sizes_are_python_s(forward):
    made, variants = variants_of(forward, [torch.randn(6, 7)], min_shapes=[(2, 3)], max_shapes=[(16, 17)])
    (run,) = [ReferenceModule(lower(variant.graph)) for variant in variants]
    for rows, columns in itertools.product(range(2, 17, 2), range(3, 18, 3)):
        x = torch.ones(rows, columns)
        assert torch.equal(run(x), made(x)), (rows, columns)


def test_a_root_of_too_many_sizes_is_refused():
    with pytest.raises(UnsupportedError, match=r"test_variants.py:\d+(.|\n)*a power or a logarithm of dynamic sizes"):
        lower(trace(module(PRODUCTS[0]), [torch.randn(6, 7)], min_shapes=[(2, 3)], max_shapes=[(160, 170)]))


# Listed sizes ---------------------------------------------------------------------------------------------------------


def _needs_a_number(self, x):
    return F.avg_pool2d(x, range(x.shape[-1])[x.shape[-1] // 2])


@pytest.mark.parametrize(
    ("forward", "count"), [(_needs_a_number, 3), (lambda self, x: x * 2, 1)], ids=["numbers", "plain"]
)
def test_listed_sizes_are_served_and_no_others(forward, count):
    made = module(forward)
    shapes = [{"x": (1, 3, 4, 4)}, {"x": (2, 3, 6, 6)}, [(1, 3, 8, 9)]]
    model_trt = torch2rt(made, [torch.randn(1, 3, 4, 4)], shapes=shapes, verify=False)
    assert len(model_trt.built.each()) == count
    run = model_trt.reference()
    for shape in [(1, 3, 4, 4), (2, 3, 6, 6), (1, 3, 8, 9)]:
        x = torch.randn(shape)
        compare(run(x), made(x))
    for shape in [(2, 3, 4, 4), (1, 3, 6, 6), (1, 3, 8, 8)]:
        with pytest.raises(InputError, match=r"listed|serve"):
            run(torch.randn(shape))


N, WIDE = torch.export.Dim("n"), torch.export.Dim("wide", min=2, max=8)


def _asks_what_is_promised(self, x, y):
    x = F.pad(x, (0, 1)) if x.shape[1] % 2 else x
    return x + y if y.shape[0] == x.shape[0] else x - 1


@pytest.mark.parametrize(
    "promised",
    [{"dynamic_shapes": {"x": (N, 2 * WIDE), "y": {0: N}}}, {"multiple_of": {"x": (1, 2)}}],
    ids=["dynamic_shapes", "multiple_of"],
)
def test_promises_beside_listed_sizes_spare_engines(promised):
    made = module(_asks_what_is_promised)
    shapes = [{"x": (b, n), "y": (b, 1)} for b, n in [(2, 4), (3, 8), (7, 6)]]
    model_trt = torch2rt(made, [torch.randn(2, 4), torch.randn(2, 1)], shapes=shapes, **promised, verify=False)
    assert len(model_trt.built.each()) == 1
    run = model_trt.reference()
    for b, n in [(2, 4), (3, 8), (7, 6)]:
        inputs = torch.randn(b, n), torch.randn(b, 1)
        compare(run(*inputs), made(*inputs))
    for b, n in [(2, 8), (2, 5), (4, 4)]:
        with pytest.raises(InputError, match=r"listed|serve|multiple"):
            run(torch.randn(b, n), torch.randn(b, 1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shapes": [], "max_batch_size": None}, "a list of choices"),
        ({"shapes": (1, 3)}, "a list of choices"),
        ({"shapes": [{"y": (1, 3)}]}, r"shapes\[0\] names \['y'\]"),
        ({"shapes": [[(1, 3)]], "max_batch_size": 3}, "leave out min_shapes"),
        ({"shapes": [[(1, 3)], [(2, 4)]], "multiple_of": [(1, 2)]}, r"multiple of 2"),
        ({"shapes": [[(2, 4)], [(2, 7)]], "multiple_of": [(1, 2)]}, r"shapes\[1\].*7: promised is a multiple"),
        ({"shapes": [[(2, 4)], [(2, 9)]], "dynamic_shapes": {"x": {1: WIDE}}}, r"shapes\[1\].*9: .* from 2 to 8"),
        ({"shapes": [[(2, 4)], [(3, 4)]], "dynamic_shapes": {"x": {1: WIDE}}}, "static in dynamic_shapes"),
        ({"shapes": [[(2, 4)], [(4, 5)]], "dynamic_shapes": {"x": (N, 2 * N)}}, r"shapes\[1\].* 5: .* multiple of 2"),
        ({"shapes": [[(2, 4)], [(4, 6)]], "dynamic_shapes": {"x": (N, 2 * N)}}, "'n' would be 3, and 4 in input 'x'"),
        ({"merge": "guess"}, "merge='guess'"),
        ({"max_variants": 0}, "max_variants"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(InputError, match=message):
        torch2rt(module(lambda self, x: x + 1), [torch.randn(2, 3)], **arguments)


# Merging by proof -----------------------------------------------------------------------------------------------------


def _warns(self, x):
    if x.shape[1] % 4 or x.shape[0] > 3:
        self.seen = "not a multiple of 4"
    return x @ x.t() * x.shape[1]


def _pads_by_nothing(self, x):
    rows = -x.shape[0] % 4
    if rows:
        x = F.pad(x, (0, 0, 0, rows))
    return x.cumsum(0) + self.weight


def _slices_what_is_longer(self, x):
    return x[:, : self.table.shape[0]].sum(1) if x.shape[1] > self.table.shape[0] else x.sum(1)


MADE_OF_FIVE = [module(_pads_by_nothing, weight=torch.randn(5)), module(_expands_table, table=torch.randn(1, 5))]


@pytest.mark.parametrize(
    ("made", "count"),
    [
        (module(_warns), 1),
        (MADE_OF_FIVE[0], 1),
        (MADE_OF_FIVE[1], 1),
        (module(_slices_what_is_longer, table=torch.randn(3)), 2),
        (module(_parity), 2),
        (module(_differs_at_one), 2),
    ],
    ids=["warns", "pads", "expands", "slices", "parity", "differs"],
)
def test_paths_with_the_same_calls_are_one_graph(made, count):
    check_coverage(made, (1, 1) if made not in MADE_OF_FIVE else (1, 5), (7, 5), count)


def test_trace_gives_one_graph_where_the_calls_are_the_same():
    made = module(_expands_table, table=torch.randn(1, 5))
    graph = trace(made, [torch.randn(2, 5)], max_batch_size=4)
    for rows in (1, 2, 4):
        x = torch.randn(rows, 5)
        compare(graph(x)[0], made(x))


# Empty sizes ----------------------------------------------------------------------------------------------------------


def _with_cache(self, x, past):
    keys = torch.cat([past, x], 1)
    return F.scaled_dot_product_attention(x[:, None], keys[:, None], keys[:, None])[:, 0], keys


def test_an_empty_cache_has_an_engine_of_its_own():
    made = module(_with_cache)
    ranges = {"min_shapes": [(1, 1, 8), (1, 0, 8)], "max_shapes": [(3, 4, 8), (3, 9, 8)]}
    model_trt = torch2rt(made, [torch.randn(2, 3, 8), torch.randn(2, 5, 8)], **ranges, verify=False)
    assert [variant.region for variant in model_trt.built.variants] == ["past.shape[1] >= 1", "past.shape[1] == 0"]
    run = model_trt.reference()
    for batch, new, before in ((1, 1, 0), (3, 4, 9), (2, 3, 0), (2, 2, 1), (1, 1, 1)):
        x, past = torch.randn(batch, new, 8), torch.randn(batch, before, 8)
        torch.testing.assert_close(run(x, past), made(x, past), rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="starts at 1"):
        trace(made, [torch.randn(2, 3, 8), torch.randn(2, 5, 8)], **ranges)
