"""Inputs are called as forward's parameters are, however a call gives them."""

import dataclasses

import pytest
import torch
from harness import compare
from test_tracing import module

from torch2rt import InputError, TRTModule, torch2rt, trace
from torch2rt.interface import Interface

A, B, C = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)


@dataclasses.dataclass
class Batch:
    tokens: torch.Tensor
    scale: float
    mask: torch.Tensor


def total(*values):
    return sum(v.tokens + v.mask if isinstance(v, Batch) else v for v in values)


NAMES = [
    # forward, inputs, kwargs, names
    (lambda self, x, y: x + y, [A, B], {}, ["x", "y"]),
    (
        lambda self, input_ids, attention_mask=None: input_ids * attention_mask,
        [A],
        {"attention_mask": B},
        ["input_ids", "attention_mask"],
    ),
    (lambda self, x, y: x - y, [], {"y": B, "x": A}, ["y", "x"]),
    (lambda self, x, /, y: x - y, [A, B], {}, ["x", "y"]),
    (lambda self, x, n, y: x * n - y, [A, 3, B], {}, ["x", "y"]),
    (lambda self, x, *args, y: x + args[0] - args[1] * y, [A, B, C], {"y": A}, ["x", "args_0", "args_1", "y"]),
    (lambda self, *args: args[0] - args[1], [A, B], {}, ["args_0", "args_1"]),
    (lambda self, x, **others: x - others["mask"], [A], {"mask": B}, ["x", "mask"]),
    (lambda self, boxes: boxes[0] - boxes[1][0], [[A, (B,)]], {}, ["boxes_0", "boxes_1_0"]),
    (lambda self, state: state["h"] - state["c.0"], [{"h": A, "c.0": B}], {}, ["state_h", "state_c_0"]),
    (lambda self, batch: total(batch), [Batch(A, 2.0, B)], {}, ["batch_tokens", "batch_mask"]),
    (lambda self, x_0, x: x_0 - x[0] + x[1], [A, [B, C]], {}, ["x_0", "x_0_0", "x_1"]),
    (lambda self, input, output_0: input - output_0, [A, B], {}, ["input", "output_0"]),
]


@pytest.mark.parametrize(("forward", "inputs", "kwargs", "names"), NAMES, ids=[",".join(row[-1]) for row in NAMES])
def test_inputs_are_called_as_the_parameters(forward, inputs, kwargs, names):
    made = module(forward)
    graph = trace(made, inputs, kwargs=kwargs, max_batch_size=4)
    interface = graph.meta["torch2rt"].interface
    assert [spec.name for spec in interface.inputs] == names
    assert not set(interface.outputs) & set(names)
    compare(graph(*interface.tensors(tuple(inputs), kwargs))[0], made(*inputs, **kwargs))


@pytest.mark.parametrize("compiled", ["script", "trace", "compile"])
def test_compiled_modules_keep_their_parameters_names(compiled):
    class Net(torch.nn.Module):
        def forward(self, pixels, mask):
            return pixels - mask

    compilers = {"script": torch.jit.script, "trace": lambda m: torch.jit.trace(m, (A, B)), "compile": torch.compile}
    interface = trace(compilers[compiled](Net().eval()), [A, B]).meta["torch2rt"].interface
    assert [spec.name for spec in interface.inputs] == ["pixels", "mask"]
    assert interface.parameters == ["pixels", "mask"]


def test_names_of_ones_own_come_first():
    names = ["left", "a b", "class", "self"]
    made = module(lambda self, *xs: xs[0] - xs[1] * xs[2] + xs[3])
    model_trt = torch2rt(made, [A, B, C, A], input_names=names, output_names="sum")
    assert (model_trt.input_names, model_trt.output_names) == (names, ["sum"])
    compare(model_trt.reference()(B, A, C, B), made(B, A, C, B))
    assert torch2rt(torch.nn.ReLU(), [A], input_names="x").input_names == ["x"]
    with pytest.raises(InputError, match=r"input_names must be strings: \[3\]"):
        trace(torch.nn.ReLU(), [A], input_names=[3])
    with pytest.raises(InputError, match=r"output_names must be strings: \[None\]"):
        trace(torch.nn.ReLU(), [A], output_names=[None])


def test_shapes_may_be_given_by_parameter():
    made = module(lambda self, x, boxes, mask: x * mask + sum(boxes))
    given = dict(inputs=[A, [B, C]], kwargs={"mask": A})
    shapes = dict.fromkeys(("x", "boxes_0", "boxes_1", "mask"), (5, 3))
    model_trt = torch2rt(made, **given, max_shapes=shapes, min_shapes=dict.fromkeys(shapes, (1, 3)))
    five = torch.randn(5, 3)
    compare(model_trt.reference()(five, [five, five], mask=five), made(five, [five, five], five))
    with pytest.raises(InputError, match=r"'boxes_1' has size 6 in dimension 0, the engine serves 1 to 5"):
        model_trt.reference()(five, [five, torch.randn(6, 3)], mask=five)
    with pytest.raises(InputError, match=r"max_shapes names \['boxes'\], the inputs are \['x', 'boxes_0', 'boxes_1'"):
        torch2rt(made, **given, max_shapes={"boxes": (5, 3)})


def test_an_engine_saved_with_other_names_keeps_them(tmp_path):
    made = module(lambda self, x, y: x - y)
    older = torch2rt(made, [A, B], input_names=["input_0", "input_1"])
    older.save_engine(tmp_path / "older.engine")
    assert TRTModule.from_engine(tmp_path / "older.engine").input_names == ["input_0", "input_1"]


POSITIONAL_ONLY = module(lambda self, a, /, b=0.0, c=0.0: a + 2 * b - c)


@pytest.mark.parametrize(
    ("kwargs", "call", "message"),
    [
        ({"c": C}, ((A, B), {}), "keywords"),  # B is b, not c
        ({"b": B}, ((A, C), {"b": B}), r"gives \['b'\] both by position and by keyword"),
    ],
)
def test_positions_are_forwards(kwargs, call, message):
    interface: Interface = trace(POSITIONAL_ONLY, [A], kwargs=kwargs).meta["torch2rt"].interface
    assert interface.parameters == ["", "b", "c"]
    with pytest.raises(InputError, match=message):
        interface.tensors(*call)
