"""Engines as files: written once and whole, and told from everything else."""

import contextlib
import copy
import hashlib
import io
import json
import os
import pickle
import tracemalloc

import pytest
import torch
from test_tracing import module

from torch2rt import Engine, EngineError, InputError, TRTModule, build, lower, torch2rt, trace
from torch2rt.backend.tensorrt import FLAVOUR, VERSION
from torch2rt.engine import artifact
from torch2rt.interface import Input, Interface

MIB = 1 << 20


@pytest.fixture(scope="module")
def model_trt():
    return torch2rt(module(lambda self, x, y: x + y), [torch.randn(2, 3), torch.randn(2, 3)], max_batch_size=4)


@pytest.fixture(scope="module")
def engine_file(model_trt, tmp_path_factory):
    path = tmp_path_factory.mktemp("engines") / "model.engine"
    model_trt.save_engine(path)
    return path


def stand_in(size):
    """A module with an engine of this size, which no GPU would take."""
    x = Input("x", torch.float32, (1, 3), (2, 3), (4, 3))
    call = {"tuple": [{"tuple": [{"leaf": 0}]}, {"dict": [], "items": []}]}
    data = hashlib.sha256(b"engine").digest() * (size // 32)
    interface = Interface([x], call, ["x"], ["y"], {"leaf": 0}, [{"output": 0}])
    return TRTModule(Engine(data, interface, {"flavour": FLAVOUR, "version": VERSION}))


def test_a_file_is_the_engine_then_the_header(model_trt, engine_file):
    data, engine = engine_file.read_bytes(), model_trt.engine_bytes
    assert data.startswith(engine) and data.endswith(artifact.MAGIC)
    header = json.loads(data[len(engine) : -16])
    assert header["digest"] == hashlib.sha256(engine).hexdigest()
    assert header["interface"] == json.loads(json.dumps(model_trt.interface.to_json()))
    loaded = TRTModule.from_engine(engine_file)
    assert loaded.engine_bytes == engine and loaded.interface == model_trt.interface


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, str])
def test_an_engine_may_come_as_a_path_or_as_bytes(model_trt, engine_file, kind):
    source = str(engine_file) if kind is str else kind(engine_file.read_bytes())
    loaded = TRTModule.from_engine(source)
    assert loaded.engine_bytes == model_trt.engine_bytes and type(loaded.engine_bytes) is bytes


def test_large_engines_are_neither_copied_to_save_nor_to_load(tmp_path):
    large, path = stand_in(96 * MIB), tmp_path / "large.engine"
    tracemalloc.start()
    try:
        large.save_engine(path)
        saving = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        loaded = TRTModule.from_engine(path)
        loading = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert saving < 16 * MIB and loading < 112 * MIB
    assert loaded.engine_bytes == large.engine_bytes


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_what_is_not_saved_whole_is_not_saved(monkeypatch, tmp_path, error):
    path = tmp_path / "model.engine"
    path.write_bytes(b"what was here")
    calls = []

    def write(file, data):
        calls.append(data)
        if len(calls) == 3:
            raise error
        file.write(data)

    monkeypatch.setattr(artifact, "_write", write)
    with pytest.raises(error):
        stand_in(20 * MIB).save_engine(path)
    assert len(calls) == 3
    assert os.listdir(tmp_path) == ["model.engine"] and path.read_bytes() == b"what was here"


def test_copies_share_the_engine(model_trt):
    assert copy.deepcopy(model_trt).engine_bytes is model_trt.engine_bytes
    assert copy.copy(model_trt).engine_bytes is model_trt.engine_bytes


# What is no engine ---------------------------------------------------------------------------------------------------


def saved(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def in_the_old_format(value):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def as_safetensors(value):
    return pytest.importorskip("safetensors.torch").save(value)


STATE = {"engine": torch.arange(9, dtype=torch.uint8)}

OTHERS = [
    (lambda data: data[: len(data) // 2], r"a truncated engine: it has \d+ of \d+ bytes"),
    (lambda data: data[:-20], "a truncated engine file: the engine is there, its calling convention is not"),
    (lambda data: data[:-9] + b"\xff" + data[-8:], "header has no sensible length"),
    (lambda data: data[100:], "truncated or damaged"),
    (lambda data: b"", "empty, and no engine"),
    (lambda data: b"hello", "no engine but a text, which begins with 'hello'"),
    (lambda data: "größer\n".encode() * 900, r"no engine but a text, which begins with 'größer\\n"),
    (lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a", "git lfs pull"),
    (lambda data: saved(STATE), r"a file of torch.save.*load_state_dict\(torch.load"),
    (lambda data: in_the_old_format(STATE), "a file of torch.save"),
    (lambda data: as_safetensors(STATE), "a safetensors file.*load_file"),
    (lambda data: b"PK\x03\x04" + bytes(300), "a zip archive"),
    (lambda data: b"\x08\x0a\x12\x07pytorch\x1a\x062.14.0:" + bytes(300), "an ONNX model"),
    (lambda data: bytes(range(200, 256)) * 9, r"No engine that torch2rt has met begins with b'\\xc8\\xc9"),
]


@pytest.mark.parametrize(("change", "message"), OTHERS, ids=[m for _, m in OTHERS])
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "bytes"])
def test_what_is_no_engine_is_named(engine_file, tmp_path, change, message, as_file):
    if "truncated engine" in message and engine_file.read_bytes()[:4] != b"vtrt":
        pytest.skip("only engines of TensorRT for RTX are known to begin with their size")
    data = change(engine_file.read_bytes())
    path = tmp_path / "other.bin"
    path.write_bytes(data)
    with pytest.raises(EngineError, match=f"(?s){message}") as caught:
        TRTModule.from_engine(path if as_file else data)
    if as_file and not any(part in message for part in ("truncated or", "met begins")):
        assert str(path) in str(caught.value)


def test_a_plain_engine_says_that_it_needs_a_gpu(model_trt):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match=r"plain engine.*asked for its inputs on a GPU.*torch sees none"):
        TRTModule.from_engine(model_trt.engine_bytes)


def test_a_missing_file_is_pythons_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        TRTModule.from_engine(tmp_path / "missing.engine")


# The value that build returns ----------------------------------------------------------------------------------------


def test_build_returns_all_that_a_module_needs(model_trt, tmp_path):
    network = lower(trace(module(lambda self, x, y: x + y), [torch.randn(2, 3), torch.randn(2, 3)], max_batch_size=4))
    engine = build(network, progress=False)
    assert bytes(engine) is engine.data and type(engine.data) is bytes
    assert (engine.made_by, engine.interface) == (model_trt.made_by, network.interface)
    made = TRTModule(engine)
    assert made.built is engine and made.network is None and TRTModule(engine, network).network is network.definition
    assert repr(made) == f"TRTModule({engine.describe()})" and repr(engine) == f"Engine({engine.describe()})"
    made.save_engine(tmp_path / "model.engine")
    assert TRTModule.from_engine(tmp_path / "model.engine").built == engine
    assert pickle.loads(pickle.dumps(engine)) == engine == copy.deepcopy(engine) == copy.copy(engine)
    assert copy.deepcopy(engine).data is engine.data and copy.deepcopy(engine).report is not engine.report


def test_a_module_takes_an_engine_and_no_bytes(model_trt):
    with pytest.raises(InputError, match=r"takes the Engine that torch2rt.build returns, not a bytes; .*from_engine"):
        TRTModule(model_trt.engine_bytes)


# Weights that stay in the host's memory ------------------------------------------------------------------------------


def test_a_weight_budget_is_kept_with_the_engine(tmp_path, monkeypatch, device):
    network = lower(trace(torch.nn.Linear(64, 64).eval(), [torch.randn(2, 64)]))
    with monkeypatch.context() as patch:
        patch.setattr("torch2rt.engine.build.has_weight_streaming", lambda: False)
        with pytest.raises(InputError, match=rf"weight_budget=0: {FLAVOUR} {VERSION} has no weight streaming"):
            build(network, weight_budget=0, progress=False)
    for wrong in (-1, 0.5, "1"):
        with pytest.raises(InputError, match="weight_budget"):
            build(network, weight_budget=wrong, progress=False)
    made = TRTModule(build(network, weight_budget=4096, progress=False))
    made.save_engine(tmp_path / "engine")
    loaded = TRTModule.from_engine(tmp_path / "engine")
    assert loaded.built.facts["built"]["options"]["weight_budget"] == 4096
    if device.type == "cuda":
        assert loaded(torch.randn(2, 64, device=device)).shape == (2, 64)
        assert loaded.engine.weight_streaming_budget_v2 <= 4096


class Streaming:
    """An `ICudaEngine`, which keeps at least 100 bytes on the GPU."""

    streamable_weights_size, budget = 5000, None

    @property
    def weight_streaming_budget_v2(self):
        return self.budget

    @weight_streaming_budget_v2.setter
    def weight_streaming_budget_v2(self, value):
        self.budget = max(value, 100)


@pytest.mark.parametrize(("asked", "kept"), [(None, None), (1000, 1000), (9000, 5000), (7, "TensorRT keeps 100 bytes")])
def test_tensorrt_is_told_the_weight_budget(monkeypatch, asked, kept):
    from torch2rt.runtime import loaded_engine

    monkeypatch.setattr(loaded_engine, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(loaded_engine.cuda, "beside_captures", contextlib.nullcontext)
    loaded = loaded_engine.LoadedEngine.__new__(loaded_engine.LoadedEngine)
    loaded.engine, loaded.index = Streaming(), 0
    if isinstance(kept, str):
        with pytest.raises(EngineError, match=kept):
            loaded._limit_weights(asked)
    else:
        loaded._limit_weights(asked)
        assert loaded.engine.budget == kept
