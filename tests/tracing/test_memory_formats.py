"""Inputs whose axes lie in memory in another order: the engine reads them so, and all others after a copy."""

import ctypes
import json
from types import SimpleNamespace

import pytest
import torch
from harness import compare
from test_callers import with_gaps
from test_module import runner
from test_tracing import module

from torch2rt import TraceError, TRTModule, torch2rt
from torch2rt.interface import Input, Interface
from torch2rt.runtime import execution
from torch2rt.runtime import inputs as inputs_file
from torch2rt.runtime.fits import Fits
from torch2rt.runtime.shared_lock import SharedLock

LAST, LAST_3D, PLAIN = torch.channels_last, torch.channels_last_3d, torch.contiguous_format


def values(shape, dtype, device="cpu"):
    """Numbers that are all different, as far as the dtype can tell."""
    count = torch.Size(shape).numel()
    x = torch.arange(count, device=device).mul(7).remainder(251).reshape(shape)
    return (
        x % 2 == 0 if dtype is torch.bool else x.to(dtype) if dtype in (torch.uint8, torch.int64) else x.to(dtype) / 99
    )


def reversed_in_memory(x):
    return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))


def after_another(x):
    """Dense in the named order, at an address that TensorRT cannot read."""
    format = LAST if x.dim() == 4 else LAST_3D
    memory = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:]
    dense = x.contiguous(memory_format=format)
    return memory.as_strided(x.shape, dense.stride(), memory.storage_offset()).copy_(x)


LAYOUTS = {
    "contiguous": torch.Tensor.contiguous,
    "channels last": lambda x: x.contiguous(memory_format=LAST if x.dim() == 4 else LAST_3D),
    "with gaps": with_gaps,
    "reversed": reversed_in_memory,
    "not aligned": after_another,
    "one sample for all": lambda x: x[:1].expand(x.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 3, 5, 4, 6)], ids=len)
def test_any_layout_is_taken(shape, dtype, dynamic, layout, device):
    def forward(self, x, y):
        return x.float().cumsum(1)[:, 1:] * 3 + y, x, x.float().flatten(2).mean(-1) * x.shape[2]

    made = module(forward)
    ranges = {"min_shapes": [(1, 3, *shape[2:]), (1,)], "max_shapes": [(4, 3, 9, *shape[3:]), (1,)]} if dynamic else {}
    y = torch.randn(1, device=device)
    model_trt = torch2rt(made, [LAYOUTS["channels last"](values(shape, dtype, device)), y], **ranges)
    assert [spec.memory_format for spec in model_trt.interface.inputs] == [LAST if len(shape) == 4 else LAST_3D, PLAIN]
    run = runner(model_trt, device)
    for size in [shape, (3, 3, 7, *shape[3:])][: 1 + dynamic]:
        x = layout(values(size, dtype, device))
        for graph in (False, True):
            run.cuda_graph = graph
            for actual, expected in zip(run(x, y), made(x, y), strict=True):
                compare(actual, expected)


@pytest.mark.parametrize("format", [LAST, PLAIN], ids=str)
def test_convolutions(format, device):
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 6, 3, stride=2), torch.nn.BatchNorm2d(6), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 1)
    )
    net = net.eval().to(device, memory_format=format)
    x = torch.randn(2, 3, 9, 8, device=device).to(memory_format=format)
    model_trt = torch2rt(net, [x], max_batch_size=3)
    lengths = tuple(model_trt.network.get_input(0).shape)
    assert lengths == ((-1, 9, 8, 3) if format is LAST else (-1, 3, 9, 8))
    assert model_trt.network.get_input(0).get_dimension_name(0)
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, 9, 8, device=device)
        for order in (LAST, PLAIN):
            compare(runner(model_trt, device)(x.to(memory_format=order)), net(x), rtol=1e-2, atol=1e-2)


def test_the_module_sees_its_example_as_it_lies(device):
    """As in eager, pixels are rows of memory then; and nobody reads memory as if it were contiguous."""
    made = module(lambda self, x: x.permute(0, 2, 3, 1).view(x.shape[0], -1, 3) if x.stride(1) == 1 else x)
    x = values((2, 3, 5, 4), torch.float32, device).contiguous(memory_format=LAST)
    model_trt = torch2rt(made, [x], max_batch_size=3)
    for batch in (2, 3):
        x = values((batch, 3, 5, 4), torch.float32, device)
        compare(runner(model_trt, device)(x), x.flatten(2).mT)
    with pytest.raises(TraceError, match="as_strided reads memory"):
        torch2rt(module(lambda self, x: x.as_strided((2, 3), (3, 1))), [x.contiguous(memory_format=LAST)])


FORMATS = {
    "channels last": (torch.zeros(2, 5, 6, 3).permute(0, 3, 1, 2), LAST),
    "one sample": (torch.zeros(1, 5, 6, 3).permute(0, 3, 1, 2), LAST),
    "volumes": (torch.zeros(2, 4, 5, 6, 3).permute(0, 4, 1, 2, 3), LAST_3D),
    "contiguous": (torch.zeros(2, 3, 5, 6), PLAIN),
    "one channel": (torch.zeros(2, 5, 6, 1).permute(0, 3, 1, 2), PLAIN),
    "one pixel": (torch.zeros(2, 1, 1, 3).permute(0, 3, 1, 2), PLAIN),
    "with gaps": (torch.zeros(2, 5, 6, 4).permute(0, 3, 1, 2)[:, :3], PLAIN),
    "transposed": (torch.zeros(3, 2).t(), PLAIN),
    "sequences": (torch.zeros(2, 6, 3).permute(0, 2, 1), PLAIN),
    "nothing": (torch.zeros(0, 5, 6, 3).permute(0, 3, 1, 2), PLAIN),
}


@pytest.mark.parametrize(("x", "format"), FORMATS.values(), ids=FORMATS)
def test_the_example_says_how_inputs_lie_in_memory(x, format):
    (spec,) = torch2rt(module(lambda self, x: x * 2), [x]).interface.inputs
    assert spec.memory_format is format
    assert str(format).removeprefix("torch.") in spec.describe() or format is PLAIN


def test_an_engine_saved_before_there_were_memory_formats(device):
    x = values((2, 3, 5, 4), torch.float32, device)
    model_trt = torch2rt(module(lambda self, x: x * 2), [x])
    state = model_trt.state_dict()
    header = json.loads(bytes(state["header"].tolist()))
    assert header["format"] == 2
    header["format"] = 1
    del header["interface"]["inputs"][0]["memory_format"], header["check"]
    state["header"] = torch.frombuffer(bytearray(json.dumps(header).encode()), dtype=torch.uint8)
    loaded = TRTModule()
    loaded.load_state_dict(state)
    assert loaded.interface == model_trt.interface
    if device.type == "cuda":
        compare(loaded(x), x * 2)


class Seen:
    """An execution context that keeps what it is told."""

    def __init__(self):
        self.shapes, self.read = {}, []

    def set_input_shape(self, name, shape):
        self.shapes[name] = shape
        return True

    def update_device_memory_size_for_shapes(self):
        return 0

    def get_tensor_shape(self, name):
        return (1,)

    def set_tensor_address(self, name, address):
        self.address = {**getattr(self, "address", {}), name: address}

    def execute_async_v3(self, stream):
        shape, count = self.shapes["x"], torch.Size(self.shapes["x"]).numel()
        memory = (ctypes.c_float * count).from_address(self.address["x"])
        self.read.append((self.address["x"], torch.tensor(list(memory)).reshape(shape)))
        return True


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("format", [LAST, PLAIN], ids=str)
def test_what_lies_as_the_engine_reads_it_is_not_copied(without_gpu_memory, monkeypatch, format, layout):
    monkeypatch.setattr(execution, "is_capturing", lambda: False)
    monkeypatch.setattr(execution, "ALIGNMENT", 16)
    monkeypatch.setattr(inputs_file, "ALIGNMENT", 16)
    shape, context = (2, 3, 5, 4), Seen()
    spec = Input("x", torch.float32, shape, shape, shape, format)
    interface = Interface([spec], {"tuple": [{"tuple": [{"leaf": 0}]}, {"dict": [], "items": []}]})
    inputs = inputs_file.Inputs(interface, torch.device("cpu"))
    inputs.index = -1
    one = execution.Execution.__new__(execution.Execution)
    one.context, one.execute, one.set_address = context, context.execute_async_v3, context.set_tensor_address
    one.inputs, one.lock, one.profile = inputs, SharedLock(), 0
    one.exact, one.changes, one.is_alone = True, 0, True
    one.loaded = SimpleNamespace(outputs=[("y", torch.float32)], fits=Fits(), scratch=None)
    one.forget()
    x = layout(values(shape, torch.float32))
    for _ in range(2):
        one.run([x], 0)
        address, read = context.read.pop()
        assert torch.equal(read, x.permute(0, 2, 3, 1) if format is LAST else x)
        as_it_lies = x.is_contiguous(memory_format=format) and x.data_ptr() % 16 == 0
        assert (address == x.data_ptr()) == as_it_lies
