"""One file: what is saved is loaded, what is damaged is named, what cannot run here is built again."""

import gc
import json
import os
import random
import re
import struct
import tracemalloc

import pytest
import torch
from test_artifact import MIB, stand_in

import torch2rt as package
from torch2rt import AccuracyError, EngineError, InputError, TRTModule, load, save, torch2rt
from torch2rt.cli.main import main
from torch2rt.conversion import rebuilt as rebuilt_file
from torch2rt.engine import container, fingerprint
from torch2rt.runtime import kernel_cache
from torch2rt.runtime.partitioned.segments import PartitionedModule
from torch2rt.runtime.stateful import StatefulModule

KEY = b"a key"


class Branches(torch.nn.Module):
    def forward(self, x, scale=2.0):
        if x.shape[1] % 2:
            return {"y": x[:, 1:] * scale}
        return {"y": x.reshape(x.shape[0], 2, -1).sum(1)}


class Mixed(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.layer(x) * 2 + 1).cumsum(0), torch.linalg.svdvals(x)[0] * 3


class Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("total", torch.zeros(3))

    def forward(self, x):
        self.total += x.sum(0)
        return self.total * x


CONVERTED = {
    "engine": (lambda: torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.GELU()), (2, 3), dict(max_batch_size=4)),
    "variants": (Branches, (2, 4), dict(min_shapes=[(1, 2)], max_shapes=[(4, 9)])),
    "partitioned": (Mixed, (6, 4), dict(fallback=True, min_segment_calls=1)),
    "stateful": (Counting, (2, 3), dict(state="write")),
}
KINDS = {"partitioned": PartitionedModule, "stateful": StatefulModule}


@pytest.fixture(scope="module", params=CONVERTED)
def saved(request, tmp_path_factory):
    """The kind, the converted module, its input, and the file, with an example and its source."""
    make, shape, options = CONVERTED[request.param]
    torch.manual_seed(1)
    x = torch.randn(shape)
    model_trt = torch2rt(make().eval(), [x], progress=False, **options)
    path = tmp_path_factory.mktemp("saved") / "model.t2rt"
    save(model_trt, path, inputs=[x], source=True, key=KEY)
    return request.param, model_trt, x, path


class Selected(torch.nn.Module):
    def forward(self, x):
        return (x[x[:, 0] > 0] * 2 + 1).relu() * 3


def test_what_is_selected_is_an_input_of_the_next_engine(tmp_path):
    """Torch calls it `__getitem__`, and so are the inputs of its graph."""
    x = torch.randn(6, 4)
    model_trt = torch2rt(Selected(), [x], fallback=True, min_segment_calls=1, verify=False)
    save(model_trt, tmp_path / "model", source=True)
    assert torch.equal(load(tmp_path / "model").reference()(x), Selected()(x))


@pytest.fixture
def other_tensorrt(monkeypatch):
    monkeypatch.setattr(fingerprint, "VERSION", "9.9")


def engines(model_trt):
    model_trt = getattr(model_trt, "converted", model_trt)
    return model_trt.engines if isinstance(model_trt, PartitionedModule) else [model_trt]


def on_cpu(module):
    """A stateful module whose state is on the CPU, as a file's is; others as they are."""
    return module.cpu() if isinstance(module, StatefulModule) else module


def ready(module, device):
    """A module on a GPU, with the state that it began with."""
    if isinstance(module, StatefulModule):
        module.to(device)
        for value in module.state.values():
            value.zero_()
    return module


def same_results(ours, theirs, shape):
    x = torch.randn(shape)
    ours, theirs = on_cpu(ours), on_cpu(theirs)
    with torch.no_grad():
        results = [torch.utils._pytree.tree_leaves(m.reference()(x)) for m in (ours, theirs)]
    return all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_saved_is_loaded(saved):
    kind, model_trt, x, path = saved
    loaded = load(path, key=KEY)
    assert type(loaded) is type(model_trt) is KINDS.get(kind, TRTModule)
    assert loaded.input_names == model_trt.input_names and loaded._interface() == model_trt._interface()
    for ours, theirs in zip(engines(loaded), engines(model_trt), strict=True):
        assert ours.built == theirs.built and isinstance(ours.built.data, memoryview)
        assert type(ours.engine_bytes) is bytes and ours.engine_bytes == theirs.engine_bytes
        assert [bytes(each) for each in ours.built.each()] == [bytes(each) for each in theirs.built.each()]
        again = TRTModule()
        again.load_state_dict(ours.state_dict())
        assert again.built == theirs.built
    assert same_results(loaded, model_trt, x.shape), "its source is the network"
    if kind == "stateful":
        assert torch.equal(on_cpu(loaded).state["total"], on_cpu(model_trt).state["total"])
        loaded.state["total"].fill_(7)
        assert load(path).state["total"].sum() == 0, "the file stays as it was"
    if kind == "partitioned":
        (ours,), (theirs,) = loaded.torch_segments, model_trt.torch_segments
        x = torch.randn(6, 4)
        assert torch.equal(ours(x)[0], theirs(x)[0])


def test_an_engine_is_built_again_by_another_tensorrt(saved, other_tensorrt):
    kind, model_trt, x, path = saved
    with pytest.raises(EngineError, match=r'(?s)TensorRT: built by .*, here is .* 9\.9\n.*rebuild="auto"'):
        load(path)
    again = load(path, rebuild="auto")
    assert "with outputs saved by the" in again.report.verified.by
    assert same_results(again, model_trt, x.shape)
    save(again, path.with_name("again"), inputs=[x], source=True)
    assert any("that it was built again for" in text for text in again.report.assumptions) or kind == "partitioned"


def test_what_was_built_again_is_kept_and_written_back(saved, monkeypatch, tmp_path):
    _, model_trt, x, path = saved
    monkeypatch.setenv("TORCH2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH2RT_CACHE_ENGINES", raising=False)
    file = tmp_path / "model.t2rt"
    file.write_bytes(path.read_bytes())
    builds, build = [], rebuilt_file.build
    monkeypatch.setattr(rebuilt_file, "build", lambda *args, **how: builds.append(1) or build(*args, **how))
    with monkeypatch.context() as here:
        here.setattr(fingerprint, "VERSION", "9.9")
        first = load(file, rebuild="auto")
        count = len(builds)
        assert count == sum(len(engine.built.each()) for engine in engines(first))
        assert file.read_bytes() == path.read_bytes()
        with pytest.raises(InputError, match=r"write_back=True: .* is signed\. Give the key="):
            load(file, rebuild="auto", write_back=True)
        again = load(file, rebuild="auto", write_back=True, key=KEY)
    assert len(builds) == count, "the engines were kept"
    assert file.read_bytes() != path.read_bytes()
    loaded = load(file, key=KEY)
    for ours, theirs, old in zip(*map(engines, (loaded, again, model_trt)), strict=True):
        assert ours.built == theirs.built and ours.interface == old.interface
        assert ours.built.report.assumptions != old.built.report.assumptions
    assert same_results(loaded, model_trt, x.shape)
    before, now = (container.read(each).manifest["example"] for each in (path, file))
    assert [row[:2] for row in now["inputs"]] == [row[:2] for row in before["inputs"]]
    with monkeypatch.context() as here:
        here.setattr(fingerprint, "VERSION", "9.9")
        assert "with outputs saved by" in load(file, rebuild="auto").report.verified.by, "it has the example and graphs"


@pytest.mark.parametrize("how", [dict(write_back=True), dict(write_back=1, rebuild="auto")])
def test_nothing_is_written_back_unless_it_may_be_built(how):
    with pytest.raises(InputError, match="write_back="):
        load("model.t2rt", **how)


def test_without_its_source_an_engine_is_not_built_again(tmp_path, other_tensorrt):
    model_trt = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], progress=False)
    save(model_trt, tmp_path / "plain")
    with pytest.raises(EngineError, match=r"source=True\) would have kept"):
        load(tmp_path / "plain", rebuild="auto")


def test_weights_that_have_changed_are_no_source(tmp_path):
    module = torch.nn.Linear(3, 2).eval()
    model_trt = torch2rt(module, [torch.randn(2, 3)], progress=False)
    with torch.no_grad():
        module.weight.add_(1)
    with pytest.raises(EngineError, match="weights of the module have changed"):
        save(model_trt, tmp_path / "model", source=True)
    assert os.listdir(tmp_path) == []


def test_gpus_that_differ(monkeypatch):
    model_trt = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], progress=False, compute_capabilities=["8.6"])
    here = fingerprint.present()
    monkeypatch.setattr(fingerprint, "present", lambda: {**here, "gpu": ["A GPU", "8.9"], "torch": "1.0"})
    found = fingerprint.differences(model_trt.built)
    assert found.grave == ["GPU: built for compute capability 8.6, here is A GPU (8.9)"]
    assert found.others == [f"torch: {torch.__version__} when it was built, here is 1.0"]


# The example ---------------------------------------------------------------------------------------------------------


def test_an_example_that_comes_out_otherwise_is_an_error(tmp_path, other_tensorrt):
    model_trt = torch2rt(torch.nn.Linear(3, 2).eval(), [x := torch.randn(2, 3)], progress=False)
    save(model_trt, path := tmp_path / "model", inputs=[x], source=True)
    file = container.read(path)
    name = file.manifest["example"]["outputs"][0][-1]
    wrong = torch.frombuffer(file.parts[name], dtype=torch.float32).clone()
    wrong[3] += 0.1
    container.write(path, file.manifest, {**file.parts, name: memoryview(wrong.numpy()).cast("B")})
    with pytest.raises(
        AccuracyError, match=r"(?s)differs from what was saved.*result 0: error 1\.0e-01, allowed"
    ) as caught:
        load(path, rebuild="auto")
    assert len(caught.value.differences) == 1


def test_verifying_needs_a_gpu_and_an_example(tmp_path):
    model_trt = torch2rt(torch.nn.ReLU(), [x := torch.randn(2, 3)], progress=False)
    save(model_trt, tmp_path / "without")
    with pytest.raises(EngineError, match=r"holds no example; save\(..., inputs=\[x\]\) keeps one"):
        load(tmp_path / "without", verify=True)
    save(model_trt, tmp_path / "with", inputs=[x])
    if torch.cuda.is_available():
        assert "saved by the engine on" in load(tmp_path / "with", verify=True).report.verified.by
    else:
        with pytest.raises(EngineError, match="verify=True needs an NVIDIA GPU"):
            load(tmp_path / "with", verify=True)


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs the engine: needs --device cuda")
    return device


def test_loaded_engines_compute_the_same(saved, on_gpu, tmp_path, monkeypatch):
    """And so they do with the kernels of the first one, of which none is compiled again."""
    _, model_trt, x, path = saved
    x = x.to(on_gpu)
    expected = [y.clone() for y in torch.utils._pytree.tree_leaves(ready(model_trt, on_gpu)(x.clone()))]
    loaded = load(path, key=KEY, verify=True)
    ours = torch.utils._pytree.tree_leaves(ready(loaded, on_gpu)(x.clone()))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    save(loaded, tmp_path / "again")
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    again = load(tmp_path / "again")
    has_kernels = kernel_cache.has_runtime_cache()
    assert all(bool(engine.built.kernels) == has_kernels for engine in engines(again))
    for a, b in zip(torch.utils._pytree.tree_leaves(ready(again, on_gpu)(x.clone())), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


def test_what_is_let_go_of_leaves_the_gpu(saved, on_gpu):
    """The second module that is loaded, run and let go of leaves no memory behind."""
    _, _, x, path = saved
    free = []
    for _ in range(3):
        loaded = ready(load(path), on_gpu)
        loaded(x.to(on_gpu))
        del loaded
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free.append(torch.cuda.mem_get_info(on_gpu)[0])
    assert free[1] - free[2] <= 2 * MIB, free


# In the background -------------------------------------------------------------------------------------------------


def test_a_file_is_loaded_in_the_background(saved, monkeypatch):
    _, model_trt, x, path = saved
    for cls in (TRTModule, PartitionedModule, StatefulModule):
        monkeypatch.setattr(cls, "warm_up", lambda self: None)
    model = load(path, key=KEY, background=True, module=lambda x: x - 1)
    assert type(model.wait(60)) is type(model_trt) and model.ready
    assert model.input_names == model_trt.input_names
    model = load(path, key=b"another", background=True, module=lambda x: x - 1, rebuild="never")
    with pytest.raises(EngineError, match="another key"):
        model.wait(60)
    assert torch.equal(model(x), x - 1)
    for wrong in (dict(background=True), dict(module=Mixed())):
        with pytest.raises(InputError, match="background=True needs module="):
            load(path, **wrong)


def test_a_file_is_built_again_in_the_background(saved, monkeypatch, other_tensorrt):
    """The helper has the TensorRT of the file, as nobody patches it there; here only its result is used."""
    kind, model_trt, _, path = saved
    if kind != "engine":
        pytest.skip("one start of a helper is enough")
    monkeypatch.setattr(TRTModule, "warm_up", lambda self: None)
    model = load(path, background=True, module=Branches(), rebuild="auto")
    converted = model.wait(120)
    assert isinstance(converted, TRTModule) and converted.interface == model_trt.interface


# Kernels -------------------------------------------------------------------------------------------------------------


class Cache:
    """A runtime cache, which refuses blobs of other GPUs."""

    def __init__(self):
        self.content = b""

    def deserialize(self, blob):
        self.content = blob if blob.startswith(b"ours") else b""
        return bool(self.content)

    def reset(self):
        self.content = b""

    def serialize(self):
        return self.content


class Compiling:
    def create_runtime_config(self):
        return self

    def create_runtime_cache(self):
        return Cache()


@pytest.mark.parametrize(("blob", "taken"), [(b"ours", b"ours"), (b"theirs", b""), (None, b"")])
def test_kernels_of_this_gpu_are_taken_from_the_file(monkeypatch, tmp_path, blob, taken):
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    monkeypatch.setattr(kernel_cache, "has_runtime_cache", lambda: True)
    monkeypatch.setattr(kernel_cache, "gpu_key", lambda device=None: "this GPU")
    model_trt = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], progress=False)
    object.__setattr__(model_trt.built, "kernels", {"this GPU" if blob else "another": [blob or b"ours"]})
    save(model_trt, tmp_path / "model")
    engine = load(tmp_path / "model").built
    cache = kernel_cache.KernelCache(Compiling(), engine.data, torch.device("cpu"), engine.kernels)
    assert cache.blob() == taken
    save(model_trt, tmp_path / "model", kernels=False)
    assert load(tmp_path / "model").built.kernels == {}


# Damage --------------------------------------------------------------------------------------------------------------


def damaged(data, draw):
    """A copy of a file with one thing wrong, and what."""
    kind = draw.choice(["bit", "byte", "cut", "longer", "moved", "swapped", "version", "zeroed"])
    data, place = bytearray(data), draw.randrange(len(data))
    if draw.random() < 0.5:  # most bytes are the engine's, but those of the head and the index say more
        place = draw.randrange(min(len(data), 4096))
    other = draw.randrange(len(data))
    if kind == "bit":
        data[place] ^= 1 << draw.randrange(8)
    elif kind == "byte":
        data[place] = (data[place] + draw.randrange(1, 256)) % 256
    elif kind == "cut":
        del data[place:]
    elif kind == "longer":
        data += bytes(draw.randrange(1, 9))
    elif kind == "moved":
        del data[place : place + draw.randrange(1, 99)]
    elif kind == "swapped":  # pages, which parts begin with
        a, b = (slice(p // 4096 * 4096, p // 4096 * 4096 + 4096) for p in (place, other))
        data[a], data[b] = data[b], data[a]
    elif kind == "version":
        data[8:12] = struct.pack("<I", draw.randrange(2, 1 << 32))
    else:
        data[place : place + 64] = bytes(len(data[place : place + 64]))
    return bytes(data), kind


@pytest.mark.parametrize("key", [None, KEY], ids=["plain", "signed"])
def test_every_damage_is_named(saved, tmp_path, key, request):
    _, _, _, path = saved
    data, draw, path = path.read_bytes(), random.Random(4), tmp_path / "damaged"
    count = 0
    while count < request.config.getoption("--corruptions") // (2 * len(CONVERTED)):
        changed, kind = damaged(data, draw)
        if changed == data:
            continue
        count += 1
        path.write_bytes(changed)
        with pytest.raises(
            EngineError, match=r"damaged|truncated|no file of torch2rt\.save|was saved in format|signed"
        ):
            load(path, key=key)
            pytest.fail(f"{kind} was not seen")


def test_a_version_that_is_not_known_is_named(saved, tmp_path):
    data = bytearray(saved[3].read_bytes())
    data[8:12] = struct.pack("<I", 7)
    import hashlib

    data[container.HEAD - 32 : container.HEAD] = hashlib.sha256(data[: container.HEAD - 32]).digest()
    (tmp_path / "later").write_bytes(data)
    with pytest.raises(EngineError, match="was saved in format 7, this torch2rt reads 1"):
        load(tmp_path / "later")


def test_damaged_state_dicts_are_named(saved, request):
    kind, model_trt, _, _ = saved
    if kind == "stateful":
        pytest.skip("its engine is a TRTModule's, which is among the others")
    draw, state = random.Random(5), model_trt.state_dict()
    for _ in range(request.config.getoption("--corruptions") // len(CONVERTED)):
        name = draw.choice(list(state))
        changed = state[name].clone()
        if draw.random() < 0.8:
            place = draw.randrange(len(changed))
            changed[place] = (int(changed[place]) + draw.randrange(1, 256)) % 256
        else:
            changed = changed[: draw.randrange(len(changed))]
        with pytest.raises(EngineError, match=r"damaged|saved in format|torch segment"):
            type(model_trt)().load_state_dict({**state, name: changed})


HARMFUL = [
    (lambda m: {**m, "kind": "other"}, "file of another kind, 'other'"),
    (lambda m: {**m, "module": {"kind": "pickle"}}, "unknown kind|makes no sense"),
    (lambda m: {**m, "module": {**m["module"], "plan": "none"}}, "has no part 'none'"),
    (lambda m: {**m, "module": {**m["module"], "engine": {}}}, "header is damaged"),
    (lambda m: [m], "makes no sense"),
]


@pytest.mark.parametrize(("change", "message"), HARMFUL, ids=[m for _, m in HARMFUL])
def test_values_that_make_no_sense_are_named(tmp_path, change, message):
    """As in a file that was written on purpose, with the right digests."""
    save(torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], progress=False), path := tmp_path / "model")
    file = container.read(path)
    container.write(path, dict(a=1), {})
    original = container.json.dumps
    try:
        container.json.dumps = lambda value: original({**value, "manifest": change(file.manifest)})
        container.write(path, {}, file.parts)
    finally:
        container.json.dumps = original
    with pytest.raises(EngineError, match=message):
        load(path)


def test_keys(saved, tmp_path):
    _, model_trt, _, path = saved
    with pytest.raises(EngineError, match="was signed with another key, or changed since"):
        load(path, key=b"another key")
    save(model_trt, tmp_path / "plain")
    with pytest.raises(EngineError, match="is not signed"):
        load(tmp_path / "plain", key=KEY)
    for key in (b"", "text", 1):
        with pytest.raises(InputError, match="key="):
            save(model_trt, tmp_path / "never", key=key)
    file = container.read(path)  # somebody changes the file, and all digests with it, but has no key
    container.write(path := tmp_path / "changed", file.manifest, {**file.parts}, b"a guess")
    with pytest.raises(EngineError, match="another key"):
        load(path, key=KEY)


# What is refused, and how it is looked at ----------------------------------------------------------------------------


def test_large_engines_are_not_copied(tmp_path):
    large, path = stand_in(96 * MIB), tmp_path / "large"
    tracemalloc.start()
    try:
        save(large, path)
        loaded = load(path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 16 * MIB and loaded.built == large.built


@pytest.mark.parametrize("value", [torch.nn.Linear(2, 2), b"engine", None], ids=repr)
def test_only_converted_modules_are_saved(tmp_path, value):
    with pytest.raises(InputError, match=r"takes what torch2rt\(\) returns"):
        save(value, tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_other_files_are_named(tmp_path):
    model_trt = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], progress=False)
    model_trt.save_engine(tmp_path / "engine")
    with pytest.raises(EngineError, match=r"no file of torch2rt.save. TRTModule.from_engine reads it"):
        load(tmp_path / "engine")
    save(model_trt, tmp_path / "saved")
    with pytest.raises(EngineError, match=r"a file of torch2rt.save: torch2rt.load\(path\) reads it"):
        TRTModule.from_engine(tmp_path / "saved")
    (tmp_path / "empty").write_bytes(b"")
    with pytest.raises(EngineError, match=r"no file of torch2rt\.save"):
        load(tmp_path / "empty")
    for wrong in (dict(rebuild="always"), dict(verify="range")):
        with pytest.raises(InputError, match=next(iter(wrong))):
            load(tmp_path / "saved", **wrong)


def test_inspect(saved, capsys):
    kind, model_trt, _, path = saved
    assert main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    assert "signed" in text and "graph and" in text and re.search("by the (engine|reference)", text)
    assert type(model_trt).__name__ in text and model_trt.input_names[0] in text
    assert f"torch2rt {package.__version__}" in text
    if kind == "partitioned":
        assert "torch.linalg.svdvals" in text
    path.with_name("cut").write_bytes(path.read_bytes()[:-1])
    assert main(["inspect", str(path.with_name("cut"))]) == 1
    assert "is truncated" in capsys.readouterr().err
    assert json.dumps(container.read(path).manifest)


def test_functions_of_torch2rt_are_not_exported_without_what_they_do():
    """torch.export runs them on tensors without values, where they give memory of no value."""
    model = torch.nn.LSTM(4, 3).eval()
    model_trt = torch2rt(model, [torch.randn(5, 2, 4)], progress=False, fallback=True, torch_executed=[""])
    with pytest.raises(EngineError, match="calls recurrent cannot be saved"):
        model_trt.state_dict()
