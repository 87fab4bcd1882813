"""Model repositories for Triton: held against Triton's own definition where `tritonclient` has it."""

import dataclasses
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch

import torch2rt as package
from torch2rt import TRTModule, save, torch2rt
from torch2rt.cli import triton
from torch2rt.cli.main import main
from torch2rt.engine.engine import Engine


class Net(torch.nn.Module):
    def forward(self, x, ids):
        return x * 2 + ids.unsqueeze(1), (ids + 1).half()


def converted(**options):
    inputs = [torch.randn(2, 3), torch.arange(2, dtype=torch.int32)]
    return torch2rt(Net(), inputs, input_names=["x", "ids"], progress=False, verify=False, **options)


@pytest.fixture(scope="module")
def model_trt():
    return converted(max_batch_size=8)


def as_of_tensorrt(model_trt, **changes):
    """As if TensorRT 10 had built it for every size of its range."""
    interface = dataclasses.replace(model_trt.built.interface, constraints=[], **changes)
    made_by = {**model_trt.built.made_by, "flavour": "tensorrt"}
    return dataclasses.replace(model_trt.built, made_by=made_by, interface=interface)


def parsed(text):
    """The configuration as Triton reads it, or as text where that is not known."""
    pytest.importorskip("tritonclient.grpc", reason="Triton's definition of config.pbtxt is in tritonclient")
    return triton.check(text)


def plain(text):
    return re.sub(r"\s+", " ", text)


def test_the_python_backend_serves_tensorrt_for_rtx(model_trt, tmp_path, capsys):
    save(model_trt, tmp_path / "net.t2rt")
    repository = tmp_path / "models"
    options = ["--instances", "3", "--delay", "500"]
    assert main(["export-triton", str(tmp_path / "net.t2rt"), str(repository), *options]) == 0
    config = plain((repository / "net" / "config.pbtxt").read_text())
    if model_trt.made_by["flavour"] == "tensorrt_rtx":
        assert 'backend: "python"' in config and "reads no plans of TensorRT for RTX" in capsys.readouterr().out
    assert 'input [{ name: "x" data_type: TYPE_FP32 dims: [3] }]' in config
    assert 'input [{ name: "ids" data_type: TYPE_INT32 dims: [1] reshape: { shape: [] } }]' in config
    assert 'output [{ name: "output_1" data_type: TYPE_FP16 dims: [1]' in config
    assert "max_batch_size: 8" in config and "max_queue_delay_microseconds: 500" in config and "count: 3" in config
    assert sorted(p.name for p in (repository / "net" / "1").iterdir()) == ["model.py", "model.t2rt"]
    assert package.load(repository / "net" / "1" / "model.t2rt").built == model_trt.built


def test_plans_of_tensorrt_are_served_as_they_are(model_trt, tmp_path):
    TRTModule(as_of_tensorrt(model_trt)).save_engine(tmp_path / "net.engine")
    assert main(["export-triton", str(tmp_path / "net.engine"), str(tmp_path), "--name", "other"]) == 0
    assert (tmp_path / "other" / "1" / "model.plan").read_bytes() == model_trt.engine_bytes
    config = parsed((tmp_path / "other" / "config.pbtxt").read_text())
    assert config.platform == "tensorrt_plan" and config.max_batch_size == 8
    assert [(x.name, list(x.dims)) for x in config.input] == [("x", [3]), ("ids", [1])]
    assert config.instance_group[0].count == 1 and list(config.instance_group[0].profile) == ["0"]


def test_without_batches(model_trt, tmp_path):
    TRTModule(as_of_tensorrt(model_trt)).save_engine(tmp_path / "net.engine")
    assert main(["export-triton", str(tmp_path / "net.engine"), str(tmp_path), "--no-batching"]) == 0
    config = parsed((tmp_path / "net" / "config.pbtxt").read_text())
    assert config.max_batch_size == 0 and list(config.input[0].dims) == [-1, 3] and list(config.input[1].dims) == [-1]
    assert not config.HasField("dynamic_batching")


def test_what_is_no_batch():
    assert triton.batch_size(converted().built) == 0
    assert triton.batch_size(converted(min_shapes=[(2, 3), (2,)], max_shapes=[(4, 3), (4,)]).built) == 0
    model_trt = torch2rt(torch.nn.Flatten(0), [torch.randn(2, 3)], max_batch_size=4, progress=False, verify=False)
    assert triton.batch_size(model_trt.built) == 4, "a dynamic first size is all that can be told: see --no-batching"


REFUSED = [
    (lambda e: e, ["--backend", "tensorrt"], r"TensorRT's|reads no plans|nobody would check"),
    (lambda e: dataclasses.replace(e, facts={}), [], "of what type and rank the output"),
    (lambda e: e, ["--name", "a/b"], "is no name for a model"),
    (lambda e: e, ["--instances", "0"], "instances"),
]


@pytest.mark.parametrize(("change", "options", "message"), REFUSED, ids=[m for *_, m in REFUSED])
def test_what_triton_cannot_serve_is_refused(model_trt, tmp_path, capsys, change, options, message):
    TRTModule(change(model_trt.built)).save_engine(tmp_path / "net.engine")
    assert main(["export-triton", str(tmp_path / "net.engine"), str(tmp_path / "models"), *options]) in (1, 2)
    assert re.search(message, capsys.readouterr().err) and not (tmp_path / "models").exists()


class Selected(torch.nn.Module):
    def forward(self, x):
        return (x[x[:, 0] > 0] * 2 + 1).relu() * 3, x.sum()


def test_a_module_in_segments(tmp_path, capsys):
    x = torch.randn(6, 4)
    options = dict(fallback=True, min_segment_calls=1, max_batch_size=8, verify=False)
    model_trt = torch2rt(Selected(), [x], **options)
    save(model_trt, tmp_path / "net.t2rt")
    assert main(["export-triton", str(tmp_path / "net.t2rt"), str(tmp_path / "models")]) == 1
    assert "inputs=[x]) keeps it" in capsys.readouterr().err
    save(model_trt, tmp_path / "net.t2rt", inputs=[x])
    assert main(["export-triton", str(tmp_path / "net.t2rt"), str(tmp_path / "models")]) == 0
    config = plain((tmp_path / "models" / "net" / "config.pbtxt").read_text())
    assert "max_batch_size: 0" in config and 'backend: "python"' in config and "dynamic_batching" not in config
    assert 'output [{ name: "output_0" data_type: TYPE_FP32 dims: [-1, -1] }]' in config
    assert 'output [{ name: "output_1" data_type: TYPE_FP32 dims: [1] reshape: { shape: [] } }]' in config
    assert (tmp_path / "models" / "net" / "1" / "model.t2rt").read_bytes() == (tmp_path / "net.t2rt").read_bytes()


def test_a_plain_engine_and_a_missing_file(model_trt, tmp_path, capsys):
    (tmp_path / "plain").write_bytes(model_trt.engine_bytes)
    assert main(["export-triton", str(tmp_path / "plain"), str(tmp_path)]) == 1
    assert main(["export-triton", str(tmp_path / "none"), str(tmp_path)]) == 2
    assert "has no calling convention" in (text := capsys.readouterr().err) and "No such file" in text
    assert isinstance(model_trt.built, Engine)


# The Python backend, with Triton's Python in its place ---------------------------------------------------------------


class Tensor:
    def __init__(self, value):
        self.value = value

    def to_dlpack(self):
        return torch.utils.dlpack.to_dlpack(self.value)

    @classmethod
    def from_dlpack(cls, name, capsule):
        made = cls(torch.utils.dlpack.from_dlpack(capsule))
        made.name = name
        return made


@pytest.fixture
def instance(model_trt, tmp_path, monkeypatch):
    """An instance of the model, whose engine is the reference."""
    utils = SimpleNamespace(
        Tensor=Tensor,
        TritonError=str,
        InferenceResponse=lambda tensors, error=None: SimpleNamespace(tensors=tensors, error=error),
        get_input_tensor_by_name=lambda request, name: request.get(name),
    )
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", utils)
    (tmp_path / "1").mkdir()
    reference = model_trt.reference()
    calls = []
    forward = type(reference).forward
    monkeypatch.setattr(
        type(reference), "forward", lambda self, *args: calls.append(len(args[0])) or forward(self, *args)
    )
    monkeypatch.setattr(package, "load", lambda path: reference)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    from torch2rt.cli.triton_model import TritonPythonModel

    instance = TritonPythonModel()
    config = json.dumps({"max_batch_size": 8})
    place = {"model_repository": str(tmp_path), "model_version": "1", "model_instance_device_id": "0"}
    instance.initialize({"model_config": config, **place})
    calls.clear()
    return instance, calls


def request(rows, columns=3):
    return {"x": Tensor(torch.randn(rows, columns)), "ids": Tensor(torch.arange(rows, dtype=torch.int32))}


def test_requests_are_one_call(instance):
    model, calls = instance
    requests = [request(2), request(1), request(4)]
    for asked, response in zip(requests, model.execute(requests), strict=True):
        expected = Net()(asked["x"].value, asked["ids"].value)
        assert [t.name for t in response.tensors] == ["output_0", "output_1"] and response.error is None
        for ours, theirs in zip(response.tensors, expected, strict=True):
            assert torch.equal(ours.value, theirs)
    assert calls == [7]


def test_each_request_has_its_own_error(instance):
    model, calls = instance
    good, wrong, missing = request(2), request(2, 4), {"x": Tensor(torch.randn(1, 3))}
    responses = model.execute([good, wrong, missing])
    assert responses[0].error is None and len(responses[0].tensors) == 2
    assert "InputError" in responses[1].error and "no input 'ids'" in responses[2].error
    assert calls == [2, 2]
    calls.clear()
    uneven = [
        {"x": Tensor(torch.randn(a, 3)), "ids": Tensor(torch.arange(b, dtype=torch.int32))} for a, b in [(2, 3), (3, 2)]
    ]
    assert all("InputError" in response.error for response in model.execute(uneven)), "not rows of one for the other"
    double, empty = {**request(2), "x": Tensor(torch.randn(2, 3).double())}, request(0)
    first, second, third = model.execute([request(1), double, empty])
    assert first.error is None and len(first.tensors[0].value) == 1, "and not in the type of the other's"
    assert "float64" in second.error and "InputError" in third.error
    assert all(response.error for response in model.execute([empty, empty])) and model.execute([]) == []
