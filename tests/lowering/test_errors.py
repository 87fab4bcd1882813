"""Every bad input gets an error that says what is wrong, before TensorRT or CUDA sees it, and nothing is lost."""

import contextlib
import dataclasses
import io

import pytest
import torch
from harness import compare
from test_tracing import module

import torch2rt as package
from torch2rt import EngineError, InputError, TraceError, TRTModule, UnsupportedError, torch2rt, trace
from torch2rt.backend import cuda
from torch2rt.errors import Torch2RTError
from torch2rt.vocabulary import converter, trt


def plus(self, x, y=None, scale=2.0):
    return x * scale if y is None else x * scale + y


def dropped(self, x):
    return torch.nn.functional.dropout(x, 0.5, self.training)


# At conversion -------------------------------------------------------------------------------------------------------

X = torch.randn(2, 3)

CONVERSIONS = [
    (dict(inputs=[X.to(torch.complex64)]), InputError, r"'x' is torch.complex64.*no complex numbers.*view_as_real"),
    (dict(inputs=[X.double()]), InputError, r"'x' is torch.float64, TensorRT takes float32"),
    (dict(inputs=[X.to_sparse()]), InputError, r"'x' is not a dense tensor"),
    (dict(inputs=[X, object()]), InputError, r"inputs\[0\]\[1\]: a object is not a tensor"),
    (dict(inputs=[X], min_shapes=[(3, 3)], max_shapes=[(1, 3)]), InputError, r"'x', dimension 0: min 3.*max 1.*order"),
    (
        dict(inputs=[X], min_shapes=[(1, 3)], opt_shapes=[(9, 3)], max_shapes=[(4, 3)]),
        InputError,
        r"min 1, opt 9, max 4",
    ),
    (dict(inputs=[X], max_shapes=[(4, 3, 1)]), InputError, r"max_shapes gives input 'x' 3 dimensions"),
    (dict(inputs=[X], max_shapes=[(4, 3), (4, 3)]), InputError, r"max_shapes has 2 shapes for 1 input"),
    (dict(inputs=[X], max_shapes={"z": (4, 3)}), InputError, r"max_shapes names \['z'\], the inputs are \['x'\]"),
    (dict(inputs=[X], max_batch_size=0), InputError, r"max_batch_size=0 must be at least 1"),
    (
        dict(inputs=[X], max_batch_size=4, max_shapes=[(3, 8)]),
        InputError,
        r"max_batch_size=4 contradicts max_shapes, which gives input 'x' \(3, 8\)",
    ),
    (dict(inputs=[X], max_batch_size=4, min_shapes=[(5, 3)]), InputError, r"dimension 0: min 5, opt 5, max 4"),
    (dict(inputs=[X], input_names=["a", "b"]), InputError, r"input_names has 2 names for 1 input"),
    (dict(inputs=[X, X], input_names=["a", "a"]), InputError, r"input_names must be distinct"),
    (dict(inputs=[X], output_names=["a", "b"]), InputError, r"output_names has 2 names for 1 output"),
    (dict(inputs=[X], output_names=["x"]), InputError, r"no input's name"),
    (dict(inputs=[X], max_workspace_size=-1), InputError, r"max_workspace_size=-1"),
    (dict(inputs=[X], optimization_level=9), InputError, r"optimization_level=9"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), CONVERSIONS, ids=[m for _, _, m in CONVERSIONS])
def test_a_bad_conversion_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        torch2rt(module(plus), **arguments)


def test_only_modules_are_converted():
    with pytest.raises(InputError, match=r"Expected a torch.nn.Module or .* to convert, got builtin"):
        torch2rt(torch.relu, [X])


def test_a_module_whose_result_depends_on_training_mode_is_refused():
    with pytest.raises(UnsupportedError, match=r"(?s)dropout.*eval\(\)"):
        torch2rt(module(dropped).train(), [X])
    torch2rt(module(dropped), [X])


def test_all_unsupported_calls_are_reported_together():
    class Inner(torch.nn.Module):
        def forward(self, x):
            return torch.linalg.eigvalsh(x)

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Inner(), Inner()

        def forward(self, x):
            return self.first(x) + self.second(x * 2) + torch.linalg.svd(x)[0]

    with pytest.raises(UnsupportedError) as caught:
        torch2rt(Outer(), [torch.randn(3, 3)])
    message = str(caught.value)
    assert message.count("eigvalsh") >= 2 and "svd" in message
    assert "in first" in message and "in second" in message
    assert message.count(__file__) >= 3


def test_calls_that_depend_on_unsupported_ones_are_reported_as_well():
    def forward(self, x):
        values, vectors = torch.linalg.eigh(x)  # no converter
        first = torch.linalg.svd(vectors * 2)[1]  # no converter
        second = torch.nn.functional.pixel_shuffle(values[None, :, None, None] + first[None, :, None, None], 2)
        wide = torch.topk(values.repeat(1_000_000), 1_000_000)[0]  # a converter that refuses
        return torch.linalg.eigvalsh(x.double() @ vectors.double()) + wide[0] + second.sum()

    made = module(forward)
    with pytest.raises(UnsupportedError) as caught:
        torch2rt(made, [torch.randn(4, 4)])
    message = str(caught.value)
    assert message.startswith("torch2rt cannot convert")
    for name in ("linalg.eigh", "linalg.svd", "topk(", "linalg.eigvalsh"):
        assert name in message
    assert "pixel_shuffle" not in message and "torch.Tensor.mul" not in message


@torch.library.custom_op("test_errors::broken", mutates_args=())
def broken(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@broken.register_fake
def _(x):
    return torch.empty_like(x)


@converter(torch.ops.test_errors.broken)
def broken_layers(ctx, x):
    return ctx.network.add_matrix_multiply(x, trt.MatrixOperation.NONE, x, trt.MatrixOperation.NONE).get_output(0)


def test_a_refused_call_does_not_blame_the_next():
    """What a converter leaves behind when TensorRT refuses a layer belongs to no other call."""
    made = module(lambda self, x: (torch.ops.test_errors.broken(x) + 1, x * 2))
    with pytest.raises(UnsupportedError, match=r"cannot convert one call(?s:.*)test_errors.broken"):
        torch2rt(made, [torch.randn(2, 3)])


def test_errors_have_one_root():
    for name in ("ConversionError", "TraceError", "UnsupportedError", "BuildError", "InputError", "EngineError"):
        assert issubclass(getattr(package, name), Torch2RTError)
    assert issubclass(InputError, ValueError) and issubclass(EngineError, RuntimeError)
    assert issubclass(TraceError, package.ConversionError)


# At a call -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def converted(device):
    x, y = torch.randn(2, 3, device=device), torch.randn(2, 3, device=device)
    return torch2rt(module(plus), [x], kwargs={"y": y, "scale": 3.0}, max_batch_size=4)


CALLS = [
    (lambda x: ((), {}), r"takes 1 positional arguments and got 0"),
    (lambda x: ((x,), {}), r"takes the keywords \['y', 'scale'\] and got \[\]"),
    (lambda x: ((x,), {"y": None, "scale": 3.0}), r"'y'\] was a tensor and is None"),
    (lambda x: ((x,), {"y": x, "scale": 4.0}), r"'scale'\] was 3.0 and is 4.0"),
    (lambda x: ((x,), {"y": x, "scale": 3.0, "other": 1}), r"got \['y', 'scale', 'other'\]"),
    (lambda x: ((x.half(),), {"y": x, "scale": 3.0}), r"'x' is torch.float16, the engine takes torch.float32"),
    (lambda x: ((x.long(),), {"y": x, "scale": 3.0}), r"'x' is torch.int64"),
    (lambda x: ((x[0],), {"y": x, "scale": 3.0}), r"'x' has 1 dimensions \(3,\)"),
    (lambda x: ((x[:, :2],), {"y": x, "scale": 3.0}), r"'x' has size 2 in dimension 1, the engine serves 3"),
    (
        lambda x: ((torch.cat([x] * 3),), {"y": x, "scale": 3.0}),
        r"'x' has size 6 in dimension 0, the engine serves 1 to 4",
    ),
    (lambda x: ((x[:0],), {"y": x[:0], "scale": 3.0}), r"has size 0 in dimension 0, the engine serves 1 to 4"),
    (lambda x: ((x[:1],), {"y": x, "scale": 3.0}), r"needs [xy].shape\[0\] == [xy].shape\[0\]"),
    (lambda x: (([x],), {"y": x, "scale": 3.0}), r"was a tensor and is a list of 1"),
]


@pytest.mark.parametrize(("make", "message"), CALLS, ids=[m for _, m in CALLS])
def test_a_bad_call_is_refused_and_the_module_still_works(converted, device, make, message):
    x = torch.randn(2, 3, device=device)
    args, kwargs = make(x)
    runs = [converted.reference()] + [converted] * (device.type == "cuda")
    for run in runs:
        with pytest.raises(InputError, match=message):
            run(*args, **kwargs)
        compare(run(x, y=x, scale=3.0), x * 3 + x)


def test_arguments_may_move_between_position_and_keyword(converted, device):
    x, y = torch.randn(3, 3, device=device), torch.randn(3, 3, device=device)
    run = converted if device.type == "cuda" else converted.reference()
    for args, kwargs in [((x, y, 3.0), {}), ((x, y), {"scale": 3.0}), ((), {"x": x, "scale": 3.0, "y": y})]:
        compare(run(*args, **kwargs), x * 3 + y)


def test_without_a_gpu_an_engine_says_so(converted, device):
    x = torch.randn(2, 3)
    if device.type == "cuda":
        with pytest.raises(InputError, match=r"'x' is on cpu, the engine on cuda:0"):
            converted(x, y=x, scale=3.0)
    elif not torch.cuda.is_available():
        with pytest.raises(EngineError, match=r"needs an NVIDIA GPU.*reference\(\)"):
            converted(x, y=x, scale=3.0)


# Saved engines -------------------------------------------------------------------------------------------------------


def state(converted):
    buffer = io.BytesIO()
    torch.save(converted.state_dict(), buffer)
    buffer.seek(0)
    return torch.load(buffer)


def test_a_damaged_state_dict_leaves_the_module_as_it_was(converted):
    good = state(converted)
    target = TRTModule()
    target.load_state_dict(good)
    flipped = {**good, "engine": good["engine"].clone()}
    flipped["engine"][1000] ^= 255
    damaged = [
        ({**good, "engine": good["engine"][:-7]}, "truncated or damaged"),
        (flipped, "truncated or damaged"),
        ({**good, "header": good["header"][:-7]}, "header is damaged"),
        ({**good, "engine": good["engine"].float()}, "'engine' of the state dict is not a 1-d uint8 tensor"),
    ]
    for bad, message in damaged:
        with pytest.raises(EngineError, match=message):
            target.load_state_dict(bad)
    with pytest.raises(RuntimeError, match="Missing key"):
        target.load_state_dict({"engine": good["engine"]})
    assert target.engine_bytes == converted.engine_bytes and target.input_names == ["x", "y"]


def test_an_empty_module_says_how_to_fill_it():
    with pytest.raises(EngineError, match=r"holds no engine yet.*load_state_dict"):
        TRTModule()(X)


def test_a_damaged_file_is_refused(converted, tmp_path):
    path = tmp_path / "model.engine"
    converted.save_engine(path)
    data = path.read_bytes()
    assert TRTModule.from_engine(path).engine_bytes == converted.engine_bytes
    for bad in (data[50:], data[:-60] + data[-16:], data[:-9] + b"\xff" + data[-8:]):
        path.write_bytes(bad)
        with pytest.raises(EngineError):
            TRTModule.from_engine(path)
    for bad in (data[:1000], b"", b"not an engine"):
        path.write_bytes(bad)
        with pytest.raises(EngineError):
            TRTModule.from_engine(path)


def test_an_engine_of_another_tensorrt_names_both(converted, device, monkeypatch):
    import torch2rt.runtime.loaded_engine as runtime

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    made_by = {"flavour": "tensorrt", "version": "9.1.0"}
    foreign = TRTModule(dataclasses.replace(converted.built, made_by=made_by))
    with pytest.raises(EngineError, match=rf"built by tensorrt 9.1.0, this is {runtime.FLAVOUR} {runtime.VERSION}"):
        foreign(X.to(device), y=X.to(device), scale=3.0)


def test_an_engine_for_another_gpu_names_both(converted, device, monkeypatch):
    import torch2rt.runtime.loaded_engine as runtime

    class Unwilling:
        def __init__(self, log):
            self.log = log

        def deserialize_cuda_engine(self, data):
            self.log.log(runtime.trt.ILogger.Severity.ERROR, "no kernels for this compute capability")

    monkeypatch.setattr(runtime.trt, "Runtime", Unwilling)
    monkeypatch.setattr(cuda, "beside_captures", contextlib.nullcontext)  # it needs a driver
    for name, value in {
        "is_available": True,
        "current_device": 0,
        "get_device_name": "NVIDIA Test",
        "get_device_capability": (8, 6),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *args, value=value: value)
    made_by = {"flavour": runtime.FLAVOUR, "version": runtime.VERSION, "target": "compute capability 8.9"}
    foreign = TRTModule(dataclasses.replace(converted.built, made_by=made_by))
    message = r"built for compute capability 8.9.*on NVIDIA Test \(compute capability 8.6\): no kernels for this"
    with pytest.raises(EngineError, match=message):
        foreign(X.to(device), y=X.to(device), scale=3.0)


def test_reference_needs_the_network(converted):
    target = TRTModule()
    target.load_state_dict(converted.state_dict())
    with pytest.raises(Torch2RTError, match="keep_network=True"):
        target.reference()


def test_trace_accepts_what_torch2rt_does():
    with pytest.raises(InputError, match="complex"):
        trace(module(plus), [X.to(torch.complex64)])
