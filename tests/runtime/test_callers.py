"""Callers of every kind: drawn calls equal eager or are refused, and leave a module that works.

A plan says how one call is made: sizes, how the tensors lie in memory, what they share, what is wrong with them, and
what the caller does afterwards. The same plans run without a GPU against `reference()`, but for the faults that only
an engine sees.
"""

import collections
import contextlib
import dataclasses
import itertools
import random

import pytest
import torch
from harness import compare
from harness.threads import at_once
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from torch2rt import torch2rt
from torch2rt.errors import InputError

NAMES = ["x", "z", "y", "i"]


class Several(torch.nn.Module):
    """Four inputs of three dtypes, two of them alike; four outputs, one empty where `x` is 8 high."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3, padding=1)
        self.table = torch.nn.Embedding(11, 4)

    def forward(self, x, z, y, i):
        looked_up = self.table(i.clamp(0, 10)).sum(1).half()
        return self.conv(x).relu() + z * 0.5, {"rest": x[:, :, 8:] - 1, "i": i * 2 + 1}, looked_up + y[:, :4]


RANGES = {
    "min_shapes": [(1, 3, 8, 8), (1, 3, 8, 8), (1, 5), (1, 3)],
    "opt_shapes": [(2, 3, 16, 16), (2, 3, 16, 16), (2, 5), (2, 3)],
    "max_shapes": [(4, 3, 32, 32), (4, 3, 32, 32), (4, 5), (4, 3)],
}
SIZES = list(itertools.product([1, 2, 4], [(8, 8), (8, 32), (9, 16), (32, 31)]))


def tensors(count, space, seed, device):
    generator = torch.Generator().manual_seed(seed)
    image = (count, 3, *space)
    made = [
        torch.randn(image, generator=generator),
        torch.randn(image, generator=generator),
        torch.randn(count, 5, generator=generator).half(),
        torch.randint(0, 11, (count, 3), generator=generator),
    ]
    return [t.to(device) for t in made]


@pytest.fixture(scope="module")
def several(device):
    torch.manual_seed(0)
    return Several().eval().to(device)


@pytest.fixture(scope="module")
def several_trt(several, device):
    return torch2rt(several, tensors(2, (16, 16), 0, device), **RANGES)


def same(actual, expected):
    compare(actual, expected, rtol=4e-3, atol=4e-3)


# What is odd but legal: from a dense tensor, one of the same shape and dtype -----------------------------------------


class Trivial(torch.Tensor):
    """A subclass that adds nothing."""


def with_gaps(t):
    return torch.stack([t, ~t if t.dtype is torch.bool else t + 1], -1)[..., 0]


def transposed(t):
    return t.transpose(0, -1).contiguous().transpose(0, -1)


def offset(t, elements):
    return torch.cat([t.new_zeros(elements), t.flatten()])[elements:].view(t.shape)


def aligned_offset(t):
    return offset(t, 256 // t.element_size())


def with_history(t):
    return t.clone().requires_grad_() * 2 if t.is_floating_point() else t + 1


def made_in_inference_mode(t):
    with torch.inference_mode():
        return t.clone()


def conjugated(t):
    return torch.view_as_complex(torch.stack([t, t], -1)).conj().imag if t.dtype is torch.float32 else t.clone()


LAYOUTS = {
    "plain": lambda t: t,
    "strided": with_gaps,
    "transposed": transposed,
    "channels last": lambda t: t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else transposed(t),
    "expanded": lambda t: t[:1].expand_as(t),
    "one number": lambda t: t.flatten()[0].expand(t.shape),
    "by 1": lambda t: offset(t, 1),
    "by 3": lambda t: offset(t, 3),
    "aligned, at an offset": aligned_offset,
    "flipped": lambda t: t.flip(-1),
    "negated": lambda t: torch._neg_view(t) if t.is_floating_point() else -t,
    "conjugated": conjugated,
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=t.is_floating_point()),
    "leaf": lambda t: t.clone().requires_grad_(t.is_floating_point()),
    "with history": with_history,
    "subclass": lambda t: t.clone().as_subclass(Trivial),
    "inference": made_in_inference_mode,
}


def overlapping(x, z):
    both = torch.cat([x.flatten(), z.flatten()[:7]])
    return both[: x.numel()].view(x.shape), both[7:].view(x.shape)


def parts_of_one(x, z):
    both = torch.cat([x, z], 1)
    return both[:, :3], both[:, 3:]


SHARING = {
    "nothing": lambda x, z: (x, z),
    "one tensor": lambda x, z: (x, x),
    "two views": lambda x, z: (x, x.view(x.shape)),
    "a negative view": lambda x, z: (x, torch._neg_view(x)),
    "overlapping": overlapping,
    "parts of one": parts_of_one,
    "x transposed": lambda x, z: (x, x.flip(1).transpose(0, 1).contiguous().transpose(0, 1)),
}


# What is wrong -------------------------------------------------------------------------------------------------------


class Wrapper(torch.Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(f"{func} of a Wrapper")


def freed(t):
    """A tensor whose memory somebody gave back."""
    t.untyped_storage().resize_(0)
    return t


# Of one tensor, something that the module must refuse.
REFUSED = {
    **{
        f"as {dtype}".replace("torch.", ""): lambda t, dtype=dtype: t.to(torch.int32 if t.dtype is dtype else dtype)
        for dtype in (
            torch.float32,
            torch.float16,
            torch.float64,
            torch.bfloat16,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.complex64,
        )
    },
    "a view of other bits": lambda t: t.view({2: torch.int16, 4: torch.int32, 8: torch.float64}[t.element_size()]),
    "one rank more": lambda t: t[None],
    "a rank less": lambda t: t[0],
    "no rank": lambda t: t.flatten()[0],
    "too many": lambda t: torch.cat([t, t, t, t, t]),
    "far too many": lambda t: t[:1].expand(1 << 40, *t.shape[1:]),
    "one more": lambda t: torch.cat([t, t[:1]]),
    "none": lambda t: t[:0],
    "no columns": lambda t: t[:, :0],
    "wide": lambda t: torch.cat([t, t], 1),
    "small": lambda t: t[:, :, :7] if t.dim() == 4 else t[:, :2],
    "large": lambda t: torch.cat([t] * 5, 3) if t.dim() == 4 else torch.cat([t] * 5, 1),
    "quantized": lambda t: torch.quantize_per_tensor(t.float(), 0.1, 0, torch.quint8),
    "None": lambda t: None,
    "a number": lambda t: 2.5,
    "text": lambda t: "x",
    "an object": lambda t: object(),
    "a type": lambda t: torch.Tensor,
    "a dtype": lambda t: torch.float32,
    "a list": lambda t: [t],
    "a pair": lambda t: (t, t),
    "a dict": lambda t: {"x": t},
    "an array": lambda t: t.cpu().numpy(),
}
# The same where only an engine sees it: the reference computes wherever torch does.
REFUSED_BY_ENGINES = {
    "on the CPU": lambda t: t.cpu(),
    "in pinned memory": lambda t: t.cpu().pin_memory(),
    "meta": lambda t: t.to("meta"),
    "on another GPU": lambda t: t.to("cuda:1") if torch.cuda.device_count() > 1 else t.cpu(),
    "sparse": lambda t: t.to_sparse(),
    "sparse rows": lambda t: t.to_sparse_csr(),
    "nested": lambda t: torch.nested.nested_tensor(list(t)),
    "jagged": lambda t: torch.nested.nested_tensor(list(t), layout=torch.jagged),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "a wrapper": Wrapper,
    "freed": lambda t: freed(t.clone()),
    "freed, at an offset": lambda t: freed(aligned_offset(t)),
    "freed, by 1": lambda t: freed(offset(t, 1)),
    "freed, transposed": lambda t: freed(transposed(t)),
    "freed, expanded": lambda t: freed(t[:1].clone().expand_as(t)),
}
# Of all arguments.
MISCALLED = {
    "the last is missing": lambda args, kwargs: (args[:-1], dict(list(kwargs.items())[: len(kwargs) - (not args)])),
    "no arguments": lambda args, kwargs: ((), {}),
    "one more": lambda args, kwargs: ((*args, *kwargs.values(), 1), {}),
    "an unknown keyword": lambda args, kwargs: (args, {**kwargs, "mask": 1}),
    "x twice": lambda args, kwargs: (args or (kwargs["x"],), {**kwargs, "x": (*args, *kwargs.values())[0]}),
    "all in a list": lambda args, kwargs: ([[*args, *kwargs.values()]], {}),
}
# Inside of what.
TRANSFORMS = {
    "vmap": lambda f, t: torch.vmap(f)(t[None]),
    "nested vmap": lambda f, t: torch.vmap(torch.vmap(f))(t[None, None]),
    "grad": lambda f, t: torch.func.grad(lambda t: f(t)[0].sum())(t),
    "jvp": lambda f, t: torch.func.jvp(f, (t,), (t,)),
    "functionalize": lambda f, t: torch.func.functionalize(f)(t),
}

FAULTS = [*REFUSED, *MISCALLED]
ENGINE_FAULTS = [*FAULTS, *REFUSED_BY_ENGINES, *TRANSFORMS]
MODES = {"grad": torch.enable_grad, "no grad": torch.no_grad, "inference": torch.inference_mode}
AFTER = ["nothing", "lose the inputs", "overwrite the inputs", "overwrite the outputs", "feed back", "same again"]


# Plans ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Plan:
    """One call, in words."""

    size: tuple
    seed: int
    layouts: list
    sharing: str
    form: str
    mode: str
    fault: str | None
    place: int
    warm: bool
    after: str
    stream: str
    borrow: bool

    def arguments(self, device):
        """The tensors of the legal call, as the caller holds them."""
        made = tensors(*self.size, self.seed, device)
        if self.sharing == "nothing":
            return [LAYOUTS[layout](t) for layout, t in zip(self.layouts, made, strict=True)]
        rest = [LAYOUTS[layout](t) for layout, t in zip(self.layouts[2:], made[2:], strict=True)]
        return [*SHARING[self.sharing](*made[:2]), *rest]

    def call(self, function, args):
        """Call with these tensors in this plan's form; a faulty plan spoils them first."""
        fault, place = self.fault, self.place
        if fault in TRANSFORMS:
            if fault in ("grad", "jvp"):
                place = place % 3  # the others have gradients
            return TRANSFORMS[fault](lambda t: function(*args[:place], t, *args[place + 1 :]), args[place])
        spoil = REFUSED.get(fault) or REFUSED_BY_ENGINES.get(fault)
        if spoil and fault not in MISCALLED:
            args = [*args[:place], spoil(args[place]), *args[place + 1 :]]
        count = {"positional": 4, "mixed": 2, "keywords": 0}[self.form]
        positional, keywords = tuple(args[:count]), dict(zip(NAMES[count:], args[count:], strict=True))
        if fault in MISCALLED:
            positional, keywords = MISCALLED[fault](positional, keywords)
        return function(*positional, **keywords)


def plan_of(pick, faults, share=2):
    """A plan, by a function that picks from a list; one of `share` is faulty."""
    fault = pick(faults) if pick(range(share)) == 0 else None
    sharing = pick(["nothing", "nothing", *SHARING]) if fault is None else "nothing"
    plain = fault is not None  # so that the fault is what is refused
    return Plan(
        size=pick(SIZES),
        seed=pick(range(5)),
        layouts=["plain" if plain else pick(list(LAYOUTS)) for _ in NAMES],
        sharing=sharing,
        form=pick(["positional", "positional", "mixed", "keywords"]),
        mode=pick(list(MODES)),
        fault=fault,
        place=pick(range(4)),
        warm=pick([True, False]),
        after=pick(AFTER),
        stream=pick(["default", "side"]),
        borrow=pick([False, False, True]),
    )


def plans(faults):
    @st.composite
    def drawn(draw):
        return plan_of(lambda options: draw(st.sampled_from(options)), faults)

    return drawn()


def expected_of(net, args):
    """What eager makes of these values, in memory that nobody else has."""
    plain = [t.detach().as_subclass(torch.Tensor).clone(memory_format=torch.contiguous_format) for t in args]
    with torch.no_grad():
        return net(*plain)


def flat(result):
    return [result[0], *result[1].values(), result[2]]


def carry_out(plan, function, net, device, borrowed=False):
    """Make the call of a plan: it is refused or right, and so is the next one."""
    args = plan.arguments(device)
    expected = expected_of(net, args)
    with MODES[plan.mode]():
        if plan.warm:
            same(function(*args), expected)
        if plan.fault is not None:
            with pytest.raises(InputError):
                plan.call(function, args)
        else:
            result = plan.call(function, args)
            assert not any(t.requires_grad for t in flat(result))
            follow_up(plan, function, net, args, result, expected, borrowed)
    good = tensors(*plan.size, plan.seed + 1, device)
    same(function(*good), expected_of(net, good))


def follow_up(plan, function, net, args, result, expected, borrowed):
    if plan.after == "lose the inputs":
        shapes = [(t.shape, t.dtype, t.device) for t in args]
        args.clear()
        with torch.inference_mode(False):
            for shape, dtype, device in shapes:  # the allocator hands out the same memory again
                torch.full(shape, 77, dtype=dtype, device=device)
    elif plan.after == "overwrite the inputs":
        for t in args:
            t.untyped_storage().fill_(0x55)
    elif plan.after == "overwrite the outputs":
        same(result, expected)
        with torch.no_grad():
            for t in flat(result):
                t.fill_(3)
        result = plan.call(function, args)
    elif plan.after == "feed back":
        first = expected_of(net, [result[0], *args[1:]])
        result, expected = function(result[0], *args[1:]), first
    elif plan.after == "same again":
        again = plan.call(function, args)
        if not borrowed:
            for before, now in zip(flat(result), flat(again), strict=True):
                assert not now.numel() or before.data_ptr() != now.data_ptr()
        same(again, expected)
    same(result, expected)


def check_drawn(count, faults, carry):
    counts = collections.Counter()

    @settings(
        max_examples=count,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(plans(faults))
    def run(plan):
        note(str(plan))
        carry(plan)
        counts["refused" if plan.fault else "right"] += 1

    run()
    print(dict(counts))
    assert counts["refused"] >= count / 10 and counts["right"] >= count / 10, counts


# Without a GPU -------------------------------------------------------------------------------------------------------


def test_drawn_calls_of_the_reference(several, several_trt, pytestconfig, device):
    reference = several_trt.reference()
    check_drawn(pytestconfig.getoption("--examples"), FAULTS, lambda plan: carry_out(plan, reference, several, device))


@pytest.mark.parametrize("form", ["positional", "mixed", "keywords"])
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_refused_by_the_reference(several, several_trt, fault, form, device):
    for place in range(4) if fault in REFUSED else [0]:
        plan = dataclasses.replace(plan_of(random.Random(0).choice, [fault], 1), place=place, form=form)
        carry_out(plan, several_trt.reference(), several, device)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout_is_what_it_says(layout, device):
    for t in tensors(2, (9, 16), 0, device):
        made = LAYOUTS[layout](t)
        assert isinstance(made, torch.Tensor) and (made.shape, made.dtype, made.device) == (t.shape, t.dtype, t.device)


def test_what_is_wrong_with_a_result_is_found(several, several_trt, device):
    reference = several_trt.reference()

    def wrong(*args, **kwargs):
        h, other, k = reference(*args, **kwargs)
        h[-1, -1, -1, -1] += 0.1
        return h, other, k

    plan = dataclasses.replace(plan_of(random.Random(0).choice, FAULTS), fault=None, sharing="nothing", warm=False)
    with pytest.raises(AssertionError, match="not close"):
        carry_out(plan, wrong, several, device)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        carry_out(dataclasses.replace(plan, fault="large", place=2), several, several, device)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")


@pytest.fixture(scope="module")
def side_stream(device):
    return torch.cuda.Stream() if device.type == "cuda" else None


@contextlib.contextmanager
def as_told(model_trt, graph=False, borrow=False):
    model_trt.cuda_graph, model_trt.borrow_outputs = graph, borrow
    try:
        yield
    finally:
        model_trt.cuda_graph = model_trt.borrow_outputs = False


GRAPHS = pytest.mark.parametrize("graph", [False, True], ids=["plain", "graph"])


@pytest.fixture
def carry(several, several_trt, side_stream, device):
    """Carry a plan out on a GPU, on its stream; CUDA must be as well as before."""

    def carry(plan, graph):
        stream = side_stream if plan.stream == "side" else torch.cuda.default_stream()
        stream.wait_stream(torch.cuda.current_stream())
        with as_told(several_trt, graph, plan.borrow), torch.cuda.stream(stream):
            carry_out(plan, several_trt, several, device, graph and plan.borrow)
        torch.cuda.synchronize()

    return carry


@GRAPHS
def test_drawn_calls(on_a_gpu, carry, graph, pytestconfig):
    check_drawn(pytestconfig.getoption("--examples"), ENGINE_FAULTS, lambda plan: carry(plan, graph))


@GRAPHS
@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_each_fault_is_refused(on_a_gpu, carry, fault, graph):
    for place in range(4):
        for warm in (True, False):
            base = plan_of(random.Random(place).choice, [fault], 1)
            carry(dataclasses.replace(base, place=place, warm=warm, form="positional"), graph)


@GRAPHS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_layout(on_a_gpu, carry, layout, graph):
    base = Plan(
        (2, (9, 16)), 0, [layout] * 4, "nothing", "positional", "grad", None, 0, False, "nothing", "default", False
    )
    for after, mode, stream in itertools.product(AFTER, MODES, ["default", "side"]):
        carry(dataclasses.replace(base, after=after, mode=mode, stream=stream), graph)


@GRAPHS
@pytest.mark.parametrize("sharing", SHARING)
def test_inputs_that_share_memory(on_a_gpu, carry, sharing, graph):
    base = Plan(
        (2, (9, 16)), 0, ["plain"] * 4, sharing, "positional", "no grad", None, 0, False, "nothing", "default", False
    )
    for after in AFTER:
        carry(dataclasses.replace(base, after=after), graph)


def test_a_graph_leaves_the_tensors_of_its_first_call_alone(on_a_gpu, several, several_trt, device):
    """A graph may read the tensors it was captured with; it must write to none of them."""
    args = tensors(2, (17, 19), 0, device)  # a size that no other test has, so that it is captured here
    kept = [t.clone() for t in args]
    with as_told(several_trt, graph=True):
        for change in (lambda t: t, torch._neg_view, lambda t: t.view(t.shape), lambda t: t.flip(-1), lambda t: t * 2):
            others = [change(args[0]), args[1], change(args[2]), args[3]]
            same(several_trt(*others), expected_of(several, others))
            for t, before in zip(args, kept, strict=True):
                assert torch.equal(t, before)


def test_a_graph_of_inference_mode_serves_calls_outside_of_it(on_a_gpu, several, several_trt, device):
    with as_told(several_trt, graph=True):
        for turn, mode in enumerate(["inference", "grad", "no grad", "inference", "grad"]):
            args = tensors(2, (18, 19), turn, device)
            with MODES[mode]():
                same(several_trt(*args), expected_of(several, args))


def test_a_graph_keeps_no_history_of_its_inputs(on_a_gpu, several, several_trt, device):
    with as_told(several_trt, graph=True, borrow=True):
        for turn in range(4):
            args = tensors(2, (19, 19), turn, device)
            args[0].requires_grad_()
            result = several_trt(*args)
            assert not any(t.requires_grad for t in flat(result))
            same(result, expected_of(several, args))


@GRAPHS
def test_bad_and_good_callers_in_several_threads(on_a_gpu, several, several_trt, device, pytestconfig, graph):
    count = pytestconfig.getoption("--examples")

    def work(seed):
        choose = random.Random(seed)
        stream = torch.cuda.default_stream() if seed % 3 == 0 else torch.cuda.Stream()
        faults = [fault for fault in ENGINE_FAULTS if fault != "jvp"]  # torch keeps its levels for the whole process
        with torch.cuda.stream(stream):
            for _ in range(count):
                plan = plan_of(choose.choice, faults, 1 if seed % 2 else 1 << 30)  # all bad, or all good
                plan.size = choose.choice(SIZES[:2])  # with every stream, less than the graphs that are kept
                try:
                    carry_out(plan, several_trt, several, device)
                except BaseException as error:
                    raise AssertionError(f"{plan}: {error}") from error

    with as_told(several_trt, graph):
        at_once([lambda seed=seed: work(seed) for seed in range(8)])
    torch.cuda.synchronize()


@pytest.mark.parametrize("caught", [False, True], ids=["abandoned", "caught"])
@pytest.mark.parametrize("fault", ENGINE_FAULTS)
def test_a_bad_call_inside_of_a_capture(on_a_gpu, several, several_trt, side_stream, device, fault, caught):
    plan = dataclasses.replace(plan_of(random.Random(0).choice, [fault], 1), place=1, form="positional")
    args = tensors(2, (9, 16), 0, device)
    spoilt = spoil_before(plan, args)
    expected = expected_of(several, args)

    def call():
        with pytest.raises(InputError):
            spoilt(several_trt)

    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream):
        several_trt(*args)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if caught:
        with torch.cuda.graph(graph, stream=side_stream):
            doubled = args[0] * 2
            call()
            doubled += 1
        args[0].add_(1)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(doubled, args[0] * 2 + 1)
        args[0].sub_(1)
        expected = expected_of(several, args)
    else:
        with pytest.raises(InputError), torch.cuda.graph(graph, stream=side_stream):
            doubled = args[0] * 2
            spoilt(several_trt)
    torch.cuda.synchronize()
    same(several_trt(*args), expected)
    with torch.cuda.stream(side_stream):
        several_trt(*args)
    torch.cuda.synchronize()
    after = torch.cuda.CUDAGraph()
    with torch.cuda.graph(after, stream=side_stream):
        result = several_trt(*args)
    after.replay()
    torch.cuda.synchronize()
    same(result, expected)


def spoil_before(plan, args):
    """The faulty call, with everything that works on the GPU done before: a capture forbids some of it."""
    if plan.fault in TRANSFORMS or plan.fault in MISCALLED:
        return lambda function: plan.call(function, args)
    spoil = REFUSED.get(plan.fault) or REFUSED_BY_ENGINES[plan.fault]
    bad = [*args[: plan.place], spoil(args[plan.place]), *args[plan.place + 1 :]]
    return lambda function: function(*bad)
