"""Converters of a user's own: beside ours, in the place of ours, and with bugs."""

import re
import subprocess
import sys
import traceback

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import TraceError, UnsupportedError, torch2rt, trace
from torch2rt.registry import REGISTRY, load
from torch2rt.vocabulary import converter, elementwise, trt

X = torch.randn(2, 3)


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """The registry, with what a test registers undone."""
    load()
    for table in ("converters", "on_complex", "composites", "fusions"):
        monkeypatch.setattr(REGISTRY, table, dict(getattr(REGISTRY, table)))
    return REGISTRY


@torch.library.custom_op("torch2rt_tests::twice", mutates_args=())
def twice(x: torch.Tensor) -> torch.Tensor:
    return x * 2


@twice.register_fake
def _(x):
    return torch.empty_like(x)


torch.library.define("torch2rt_tests::relu_", "(Tensor(a!) x) -> Tensor(a!)")
torch.library.impl("torch2rt_tests::relu_", "CompositeExplicitAutograd", lambda x: x.mul_(2))


def tripled(ctx, input):
    return elementwise(ctx, trt.ElementWiseOperation.PROD, input, 3.0)


@pytest.mark.parametrize(
    ("target", "call"),
    [
        (torch.relu, lambda self, x: torch.relu(x)),
        (torch.relu, lambda self, x: torch.relu_(x.clone())),
        (torch.relu, lambda self, x: torch.ops.aten.relu(x)),
        (torch.ops.aten.relu.default, lambda self, x: torch.ops.aten.relu.default(x)),
        (F.tanhshrink, lambda self, x: F.tanhshrink(x)),
        (F.normalize, lambda self, x: F.normalize(x)),
    ],
    ids=["function", "in-place", "packet", "overload", "composite", "opened"],
)
def test_override_replaces_what_torch2rt_does(target, call):
    converter(target, override=True)(lambda ctx, input, *rest, **more: tripled(ctx, input))
    model_trt = torch2rt(module(call), [X], max_batch_size=4, verify=False)
    x = torch.randn(3, 3)
    compare(model_trt.reference()(x), x * 3)


def test_override_is_not_fused_away():
    @converter(F.batch_norm, override=True)
    def batch_norm(ctx, input, *rest, **more):
        return tripled(ctx, input)

    made = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4)).eval()
    x = torch.randn(2, 3, 5, 5)
    compare(torch2rt(made, [x], verify=False).reference()(x), made[0](x) * 3)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.relu], r"mine: torch.relu has a converter, relu\. Pass override=True"),
        ([twice, torch.relu], "torch.relu has a converter"),
        ([torch.ops.aten.relu.default], r"torch.ops.aten.relu.default has a converter, relu\."),
        ([torch.relu_], r"relu_ writes in place, .* a call of torch.relu and a write"),
        ([torch.Tensor.add_], r"Tensor.add_ writes in place, .* a call of torch.Tensor.add and a write"),
    ],
)
def test_a_second_converter_is_refused_and_breaks_nothing(targets, message):
    before = dict(REGISTRY.converters)
    with pytest.raises(ValueError, match=message):

        @converter(*targets)
        def mine(ctx, input):
            return input

    assert before == REGISTRY.converters
    compare(torch2rt(torch.nn.ReLU(), [X]).reference()(X), X.relu())


def test_what_is_opened_has_no_second_body():
    target = next(t for t in REGISTRY.composites if t not in REGISTRY.converters)
    with pytest.raises(ValueError, match="has a converter"):
        converter(target)(tripled)


def test_registering_comes_before_the_first_conversion():
    """In a process of its own, where no converter of ours has been imported yet."""
    script = (
        "import torch\n"
        "from torch2rt import converter, torch2rt\n"
        "for arguments in ({}, {'override': True}):\n"
        "    try:\n"
        "        converter(torch.relu, **arguments)(lambda ctx, input: input)\n"
        "    except ValueError as error:\n"
        "        print(error)\n"
        "x = torch.tensor([-1.0])\n"
        "print(torch2rt(type('M', (torch.nn.Module,), {'forward': lambda self, x: torch.relu(x)})(), [x],"
        " verify=False).reference()(x))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done
    assert "torch.relu has a converter" in lines[0] and lines[1] == "tensor([-1.])"


def test_an_in_place_operator_of_another_library_is_not_atens():
    with pytest.raises(TraceError, match=r"relu_\.default writes through"):
        trace(module(lambda self, x: torch.ops.torch2rt_tests.relu_.default(x + 1)), [X])


def layer_alone(ctx, x):
    return ctx.network.add_unary(x, trt.UnaryOperation.ABS)


def of_another_shape(ctx, x):
    return torch.zeros(3, 2)


RESULTS = [
    (lambda ctx, x: None, "the converter returned None; it must return a TensorRT tensor"),
    (lambda ctx, x: 3, "the converter returned a int; it must return a TensorRT tensor"),
    (layer_alone, r"returned a I\w*Layer; it must return layer.get_output\(0\)"),
    (lambda ctx, x: elementwise(ctx, trt.ElementWiseOperation.LESS, x, 0.0), "the converter gives DataType.BOOL"),
    (of_another_shape, r"the converter gives torch.float32 \(3, 2\) for a result of torch.float32 \(2, 3\)"),
    (lambda ctx, x, y: x, "missing 1 required positional argument: 'y'"),
]


@pytest.mark.parametrize(("function", "message"), RESULTS, ids=[m for _, m in RESULTS])
def test_a_wrong_result_is_told(function, message):
    converter(twice)(function)
    with pytest.raises(UnsupportedError, match=message) as caught:
        torch2rt(module(lambda self, x: torch.ops.torch2rt_tests.twice(x)), [X])
    assert "torch2rt_tests.twice" in str(caught.value) and caught.value.__cause__ is None


def test_several_results_are_told():
    converter(torch.aminmax, override=True)(lambda ctx, input, *, dim=None, keepdim=False: None)
    with pytest.raises(UnsupportedError, match="the converter returned None for 2 results"):
        torch2rt(module(lambda self, x: torch.aminmax(x, dim=1)), [X])


def test_a_constant_may_be_a_result():
    converter(twice)(lambda ctx, x: torch.full((2, 3), 7.0))
    made = module(lambda self, x: torch.ops.torch2rt_tests.twice(x) + x)
    compare(torch2rt(made, [X], verify=False).reference()(X), X + 7)


def test_a_bug_in_a_converter_keeps_its_traceback():
    def helper():
        return {}["missing"]

    @converter(twice)
    def buggy(ctx, x):
        return helper()

    with pytest.raises(UnsupportedError, match=r"(?s)linalg.*KeyError: 'missing' \(.*/test_own\w+.py:\d+\)") as e:
        torch2rt(module(lambda self, x: torch.linalg.svdvals(x) + torch.ops.torch2rt_tests.twice(x).sum()), [X])
    shown = "".join(traceback.format_exception(e.value))
    assert re.search(r"in buggy\n.*\n(.*\^\n)?.*in helper\n.*return \{\}\[\"missing\"\]", shown)
