"""Tracing alone: the graph computes what the module does, whatever Python it is written in."""

import gc
import random
import threading
import types
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from harness import compare
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from torch2rt import TraceError, trace
from torch2rt.callables import qualified_name

GENERATOR = torch.Generator().manual_seed(3)


def module(forward, **attributes):
    """A module around a function of itself and its inputs."""
    made = torch.nn.Module()
    for name, value in attributes.items():
        if isinstance(value, torch.Tensor) and not isinstance(value, torch.nn.Parameter):
            made.register_buffer(name, value)
        else:
            setattr(made, name, value)
    cls = type("Made", (torch.nn.Module,), {"forward": forward})
    made.__class__ = cls
    return made.eval()


def graph_equals_eager(made, *inputs, **ranges):
    graph = trace(made, list(inputs), **ranges)
    results = graph(*[i.clone() for i in inputs])
    expected = made(*[i.clone() for i in inputs])
    compare(tuple(results), expected if isinstance(expected, tuple) else (expected,), 0.0, 0.0)
    return graph


def calls(graph):
    return [qualified_name(n.target) for n in graph.graph.nodes if n.op == "call_function"]


def test_what_does_not_depend_on_the_inputs_is_folded():
    def forward(self, x):
        table = torch.arange(12).reshape(3, 4).float().sin() * self.w
        mask = x.new_zeros(3, 4)
        mask[1, 2:] = 5.0
        return x + table + mask

    graph = graph_equals_eager(
        module(forward, w=torch.nn.Parameter(torch.randn(4))), torch.randn(2, 3, 4), max_batch_size=4
    )
    assert calls(graph) == ["torch.Tensor.add", "torch.Tensor.add"]


def test_a_constant_that_changes_while_tracing_keeps_each_value():
    def forward(self, x):
        step = torch.zeros(3)
        first = x + step
        step += 1
        second = x * step
        step[0] = 7
        return first, second, x - step

    graph_equals_eager(module(forward), torch.randn(2, 3))


def test_python_composites_are_opened_at_the_function_level():
    graph = graph_equals_eager(module(lambda self, x: F.normalize(x, dim=1)), torch.randn(2, 3))
    assert not [c for c in calls(graph) if "normalize" in c]


def test_a_parameter_keeps_its_name_and_memory():
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()).eval()
    graph = trace(made, [torch.randn(2, 3)])
    assert graph.get_parameter("0.weight") is made[0].weight


def test_nodes_carry_module_path_and_the_users_line():
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), module(lambda self, x: x * 2))
    graph = trace(made, [torch.randn(2, 3)])
    linear, double = (n for n in graph.graph.nodes if n.op == "call_function")
    assert (linear.meta["module"], double.meta["module"]) == ("0", "1")
    assert double.meta["source"].startswith(__file__)


def test_symbolic_sizes_reach_the_graph_as_arithmetic():
    def forward(self, x, y):
        b, s = x.shape[0], y.shape[1]
        half = s // 2
        return (y[:, :half] * b).reshape(b * half, -1), x.expand(b, 3) + (s - half), b * half

    made = module(forward)
    ranges = {"min_shapes": [(1, 1), (1, 4, 2)], "max_shapes": [(4, 1), (4, 9, 2)]}
    graph = trace(made, [torch.randn(2, 1), torch.randn(2, 5, 2)], **ranges)
    for batch, length in [(1, 4), (3, 9), (4, 7)]:
        inputs = torch.randn(batch, 1), torch.randn(batch, length, 2)
        compare(graph(*inputs), made(*inputs)[:2], 0.0, 0.0)


def test_two_threads_do_not_meet():
    import concurrent.futures

    def one(width):
        made = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU()).eval()
        for _ in range(5):
            graph_equals_eager(made, torch.randn(2, 3), max_batch_size=4)
        return width

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(one, range(3, 11))) == list(range(3, 11))


def test_tracing_leaves_no_trace():
    before = (torch.Tensor.size, torch.nn.Module.__call__, F.relu, torch.is_grad_enabled())
    trace(torch.nn.ReLU(), [torch.randn(2)])
    assert before == (torch.Tensor.size, torch.nn.Module.__call__, F.relu, torch.is_grad_enabled())
    assert (torch.ones(2) + 1).tolist() == [2, 2]


# Python that a graph cannot follow ----------------------------------------------------------------------------------


def _buffer_write(self, x):
    self.n += x.sum(0)
    return x + self.n


def _buffer_step(self, x):
    self.n += 1
    return x + self.n


def _branch(self, x):
    return x if x.sum() > 0 else -x


def _input_write(self, x):
    x += 1
    return x


def _numpy(self, x):
    return torch.from_numpy(x.numpy() + 1)


def _address(self, x):
    return x + (x * 2).data_ptr()  # as a kernel of another library is launched


def _item(self, x):
    return x * x[0, 0].item()


def _caught(self, x):
    try:
        return x * x[0, 0].item()
    except Exception:
        return x + 1


def _nothing(self, x):
    return x.shape[0]


REFUSED = [
    (_buffer_write, r"writes to its own 'n' from traced values"),
    (_buffer_step, r"writes to its parameter or buffer 'n'"),
    (_branch, r"test_tracing.py:\d+.*Python depends on the value of a tensor.*torch.where"),
    (_input_write, r"writes to its input 'x' in place"),
    (_numpy, r"test_tracing.py:\d+.*torch.Tensor.numpy takes a traced tensor out of torch"),
    (_address, r"test_tracing.py:\d+.*torch.Tensor.data_ptr takes a traced tensor out of torch.*custom_op"),
    (_item, r"test_tracing.py:\d+.*Python depends on the value of a tensor"),
    (_caught, r"test_tracing.py:\d+.*Python depends on the value of a tensor"),
    (_nothing, r"returns no tensor"),
]
READS_AN_INTEGER = [
    lambda self, x, n: x[:, : n.item()],
    lambda self, x, n: (x, n.item() + 1),
    lambda self, x, n: x * int(n),
    lambda self, x, n: x.narrow(1, 0, n),
]


@pytest.mark.parametrize(("forward", "message"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_python_that_depends_on_data_or_state_is_refused_by_line(forward, message):
    with pytest.raises(TraceError, match=message):
        trace(module(forward, n=torch.zeros(3)), [torch.randn(2, 3)])


@pytest.mark.parametrize("forward", READS_AN_INTEGER)
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
def test_the_value_of_an_integer_input_is_not_read(forward, dtype):
    with pytest.raises(TraceError, match=r"test_tracing.py:\d+.*depends on the value"):
        trace(module(forward), [torch.randn(2, 3), torch.tensor(2, dtype=dtype)])


def test_errors_of_torch_itself_may_be_caught():
    def falls_back(self, x):
        try:
            return x.reshape(5, -1)
        except RuntimeError:
            return x + 1

    graph_equals_eager(module(falls_back), torch.randn(2, 3))


def test_a_refused_buffer_write_does_not_happen():
    made = module(_buffer_step, n=torch.zeros(3))
    with pytest.raises(TraceError):
        trace(made, [torch.randn(2, 3)])
    assert made.n.tolist() == [0, 0, 0]


def test_the_opened_copy_does_not_touch_the_original():
    assert isinstance(F.normalize, types.FunctionType)
    original = F.normalize.__globals__["has_torch_function_variadic"]
    trace(module(lambda self, x: F.normalize(x)), [torch.randn(2, 3)])
    assert F.normalize.__globals__["has_torch_function_variadic"] is original


def test_autocast_is_recorded_as_the_casts_it_makes():
    made = torch.nn.Linear(4, 3).eval()

    def forward(self, x):
        with torch.autocast("cpu", torch.bfloat16):
            return made(x)

    graph = trace(module(forward), [torch.randn(2, 4)])
    assert next(iter(graph(torch.randn(2, 4)))).dtype is torch.bfloat16
    assert len(calls(graph)) > 1


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, factor):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x) * factor

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


@torch.jit.script
def bucket(x, size: int):
    return torch.where((x < size) & (x > -size), torch.tensor(size - 1).type_as(x), torch.abs(x)) * torch.sign(x)


@torch.jit.script
def beside_sizes(x, scale: float):
    rows = torch.full([x.size(0), 1], scale).expand([x.size(0), x.size(1)])
    return torch.cat([bucket(x, 2), rows / 2, x.new_full([x.size(0), 1], x.size(0) * 0.5)], 1)


LINEAR = torch.nn.Linear(3, 4).eval()
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    TRACED = torch.jit.trace(lambda x: x.relu() if x.sum() > 0 else x * 2, torch.ones(2, 3))  # it always took the first
AROUND = {
    "autograd.Function": lambda self, x: Swish.apply(x, 2.0),
    "checkpoint": lambda self, x: torch.utils.checkpoint.checkpoint(LINEAR, x, use_reentrant=False),
    "functional_call": lambda self, x: torch.func.functional_call(LINEAR, {"weight": LINEAR.weight * 2}, (x,)),
    "vmap": lambda self, x: torch.vmap(LINEAR)(x),
    "vmap of two": lambda self, x: torch.vmap(lambda a, b: (a @ b).softmax(0), in_dims=(0, None))(x, x[0].outer(x[1])),
    "grad": lambda self, x: torch.func.grad(lambda y: (y * y).sum())(x),
    "compile": torch.compile(lambda self, x: LINEAR(x).relu(), backend="eager"),
    "jit.script": lambda self, x: bucket(x * 3, 2),
    "jit.script of sizes": lambda self, x: beside_sizes(x * 3, scale=3),
    "jit.trace": lambda self, x: TRACED(x * 3),
    "no_grad": torch.no_grad()(lambda self, x: LINEAR(x)),
    "inference_mode": torch.inference_mode()(lambda self, x: LINEAR(x)),
    "round": lambda self, x: x.repeat(round(x.shape[0] * 1.5), 1)[: round(x.shape[0] / 2)],
}


@pytest.mark.parametrize("forward", AROUND.values(), ids=AROUND)
def test_what_people_put_around_their_calls(forward):
    x = torch.randn(2, 3)
    with torch.no_grad():
        made = module(lambda self, *args: forward(self, *args))
        graph = graph_equals_eager(made, x, min_shapes=[(2, 3)], max_shapes=[(4, 3)])
        for batch in (3, 4):
            x = torch.randn(batch, 3)
            compare(graph(x)[0], forward(None, x), 1e-6, 1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_modules_in_other_wrappers():
    x = torch.randn(2, 3)
    with torch.no_grad():
        for wrapped in (
            torch.compile(LINEAR),
            torch.jit.trace(LINEAR, x),
            torch.jit.script(LINEAR),
            torch.fx.symbolic_trace(LINEAR),
            torch.export.export(LINEAR, (x,)).module(),
            *([] if torch.cuda.is_available() else [torch.nn.DataParallel(LINEAR)]),  # which moves it to the GPU
        ):
            compare(trace(wrapped, [x])(x)[0], LINEAR(x), 1e-6, 1e-6)


def test_the_compilers_are_themselves_again_after_a_trace():
    from torch._dynamo import eval_frame

    script = torch.jit.ScriptFunction.__call__
    with pytest.raises(TraceError):
        trace(module(lambda self, x: bucket(x, 2) if x.sum() > 0 else -x), [torch.randn(2, 3)])
    assert eval_frame._stance.stance == "default" and torch.jit.ScriptFunction.__call__ is script


def test_a_trace_leaves_the_scripts_of_other_threads_alone(monkeypatch):
    """They run compiled, while a trace in this thread runs their Python."""
    calls, x = [], torch.randn(2, 3)
    monkeypatch.setattr(bucket, "_torchdynamo_inline", lambda x, size: calls.append(threading.get_ident()) or x)
    results = []

    def forward(self, x):
        y = bucket(x, 2)
        thread = threading.Thread(target=lambda: results.append(bucket(torch.full((2,), 5.0), 2)))
        thread.start()
        thread.join()
        return y * 2

    trace(module(forward), [x])
    assert set(calls) == {threading.get_ident()} and results[0].tolist() == [5.0, 5.0]


def test_assertions_about_values_are_refused():
    with pytest.raises(TraceError, match=r"value of a tensor \(torch._assert\)"):
        trace(module(lambda self, x: (torch._assert((x > 0).all(), "positive"), x)), [torch.rand(2, 3)])


class Keeping(torch.nn.Module):
    """A module that keeps tensors between calls."""

    def __init__(self, keep):
        super().__init__()
        self.keep, self.held, self.list, self.dict = keep, None, [], {}
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        return self.keep(self, x)


def cached(self, x):
    if self.held is None or len(self.held) != x.shape[0]:
        self.held = torch.arange(x.shape[0]) * 2.0
    return x + self.held[:, None]


def shown(self, x):
    self.held = x * 2
    self.list.append(x)
    self.dict["x"] = (x, self.held)
    return self.held + 1


@pytest.mark.parametrize("keep", [cached, shown])
def test_a_module_is_left_as_it_was(keep):
    made = Keeping(keep).eval()
    graph = trace(made, [torch.randn(2, 3)], min_shapes=[(2, 3)], max_shapes=[(5, 3)])
    assert (made.held, made.list, made.dict) == (None, [], {})
    for batch in (2, 4):
        x = torch.randn(batch, 3)
        compare(graph(x)[0], Keeping(keep)(x))


def decaying(self, x):
    self.held = x if self.held is None else self.held * 0.5 + x
    return self.held


def collecting(self, x):
    self.list.append(x)
    return sum(self.list)


def remembering(self, x):
    if "first" not in self.dict:
        self.dict["first"] = x.sum(0)
    return x + self.dict["first"]


def averaging(self, x):
    self.mean = self.mean * 0.9 + x.mean(0) * 0.1
    return x - self.mean


@pytest.mark.parametrize(
    ("keep", "name"), [(decaying, "held"), (collecting, "list"), (remembering, "dict"), (averaging, "mean")]
)
def test_results_that_depend_on_earlier_calls_are_refused(keep, name):
    with pytest.raises(TraceError, match=rf"test_tracing.py:\d+.*'{name}.*an earlier call"):
        trace(Keeping(keep).eval(), [torch.randn(2, 3)])


K = torch.tensor(2)
NUMBERS = {
    "pad": lambda self, x: F.pad(x, (1, K)),
    "slice": lambda self, x: x[:, : torch.tensor(3), K],
    "reshape": lambda self, x: x.reshape(-1, K),
    "sum": lambda self, x: x.sum(K),
    "expand": lambda self, x: x[:, :1].expand(-1, K, -1),
    "split": lambda self, x: x.split(K, 1),
    "roll": lambda self, x: x.roll(K, 1),
    "topk": lambda self, x: x.topk(K)[0],
    "interpolate": lambda self, x: F.interpolate(x, size=K * 3),
    "add": lambda self, x: x + K,
}


@pytest.mark.parametrize("forward", NUMBERS.values(), ids=NUMBERS)
def test_constant_tensors_in_the_place_of_numbers(forward):
    graph_equals_eager(module(forward), torch.randn(2, 4, 6), min_shapes=[(2, 4, 6)], max_shapes=[(4, 4, 6)])


def test_a_size_that_python_cannot_take_is_refused_at_its_line():
    made = module(lambda self, x: x + ~x.shape[0])
    with pytest.raises(TraceError, match=r"test_tracing.py:\d+: Python code needs a dynamic size"):
        trace(made, [torch.randn(2, 3)], max_batch_size=4)


def test_random_numbers_that_nothing_depends_on():
    def layer_drop(self, x):
        chance = torch.rand([])  # drawn in eval mode too
        skip = self.training and (chance < 0.5)
        noise = torch.empty(3).normal_() * 2
        del noise
        return x if skip else x + 1

    graph_equals_eager(module(layer_drop), torch.randn(2, 3))


@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x + torch.rand(3) * 2,
        lambda self, x: x if torch.rand([]) < 0.5 else x + 1,
        lambda self, x: x * torch.rand(3)[0].item(),
        lambda self, x: x + torch.empty(3).normal_()[None],
        lambda self, x: x[torch.randperm(2)],
        lambda self, x: torch.zeros(2, 3).index_put_((torch.randint(2, (1,)),), x[:1]),
        lambda self, x: torch.normal(x, x.abs()),
        lambda self, x: torch.normal(torch.zeros(3), x.abs() + 1),
        lambda self, x: torch.normal(x, 2.0, generator=GENERATOR),
        lambda self, x: x + torch.rand(3, generator=GENERATOR),
        lambda self, x: torch.empty_like(x).geometric_(0.5),
        lambda self, x: torch.svd_lowrank(x, 1)[1],
        lambda self, x: torch.vmap(lambda row: row + torch.rand(3), randomness="different")(x),
    ],
)
def test_random_numbers_are_refused(use):
    with pytest.raises(TraceError, match=r"test_tracing.py:\d+.*draws? random numbers"):
        trace(module(use), [torch.randn(2, 3)])


def test_a_generator_is_refused_with_dynamic_shapes():
    made = module(lambda self, x: torch.normal(x, 2.0, generator=GENERATOR))
    with pytest.raises(TraceError, match=r"test_tracing.py:\d+.*draws random numbers"):
        trace(made, [torch.randn(2, 3)], max_batch_size=4)


@pytest.mark.parametrize(
    "use",
    [
        lambda self, x: x * random.random(),
        lambda self, x: x + torch.tensor(np.random.rand(3), dtype=torch.float32),
        lambda self, x: torch.cond(x.sum() > 0, lambda x: x + random.random(), lambda x: x, (x,)),
    ],
)
def test_random_numbers_from_elsewhere_are_refused(use):
    with pytest.raises(TraceError, match=r"Python's random or numpy.random"):
        trace(module(use), [torch.randn(2, 3)])


def test_random_numbers_from_elsewhere_that_nothing_depends_on():
    constant = torch.tensor([1.0, torch.nan, torch.inf])

    def layer_drop(self, x):
        skip = random.uniform(0, 1) < 0.5 and self.training
        mask = torch.full((3,), -torch.inf, dtype=torch.bfloat16) + np.random.rand() * 0
        return x if skip else torch.cond(x.sum() > 0, lambda x: x + constant, lambda x: x - 1, (x,)) + mask

    graph_equals_eager(module(layer_drop), torch.randn(2, 3))


@pytest.mark.parametrize("norm", [torch.nn.LayerNorm, torch.nn.BatchNorm1d])
def test_layers_alike_are_worked_out_once(norm):
    """torch's fake mode knows a call again by the types of its tensors if all of them are fake, the weights too."""

    def worked_out(layers):
        alike = [torch.nn.Sequential(torch.nn.Linear(5, 5), norm(5)) for _ in range(layers)]
        FakeTensorMode.cache_clear()
        trace(torch.nn.Sequential(*alike).eval(), [torch.randn(2, 5)])
        info = FakeTensorMode.cache_info()
        return info.misses, {why: n for why, n in info.bypasses.items() if why != "CompositeImplicitAutograd"}

    assert worked_out(6) == worked_out(2)
    assert worked_out(2)[0] > 0


def test_garbage_collection_is_put_off_and_comes_back():
    seen = []

    class Looks(torch.nn.Module):
        def forward(self, x):
            if isinstance(x, FakeTensor):
                seen.append(gc.isenabled())
            if x.shape[-1] > 4:
                raise ValueError("too wide")
            return x + 1

    trace(Looks(), [torch.randn(2, 3)])
    with pytest.raises(ValueError, match="too wide"):
        trace(Looks(), [torch.randn(2, 5)])
    assert gc.isenabled() and not any(seen)
    gc.disable()
    try:
        trace(Looks(), [torch.randn(2, 3)])
        assert not gc.isenabled()
    finally:
        gc.enable()
