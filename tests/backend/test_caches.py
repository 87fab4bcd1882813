"""Files that outlive the process: what they are named after, what damages them, and who else writes."""

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from harness.threads import at_once

from torch2rt import build, lower, trace
from torch2rt.backend import disk_cache as caches
from torch2rt.backend.quirks import create_execution_context
from torch2rt.backend.tensorrt import IS_RTX, trt
from torch2rt.engine.timing_cache import TimingCache
from torch2rt.runtime.kernel_cache import KernelCache

GPU = {"name": "NVIDIA Test", "major": 8, "minor": 9, "multi_processor_count": 60, "total_memory": 2**34}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to name files after; nothing runs on it."""
    properties = SimpleNamespace(**GPU)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: properties)
    return properties


# The folder ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"TORCH2RT_CACHE": ""}, None),
        ({"TORCH2RT_CACHE": "/a/b"}, "/a/b"),
        ({"TORCH2RT_CACHE": "~/b", "HOME": "/h"}, "/h/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/torch2rt"),
        ({"XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/torch2rt"),
    ],
)
def test_folder(environment, expected, monkeypatch):
    monkeypatch.delenv("TORCH2RT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert caches.folder() == (None if expected is None else Path(expected))


def test_no_home_is_no_folder(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("TORCH2RT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", home)
    assert caches.folder() is None


# Names ---------------------------------------------------------------------------------------------------------------


def test_a_name_is_stable(folder, gpu):
    file = caches.path("kernels", None, "a", "b")
    assert file == caches.path("kernels", None, "a", "b")
    assert file.parent == folder and file.suffix == ".kernels"
    assert file != caches.path("kernels", None, "ab")
    assert file != caches.path("kernels", None, "a", "c")
    assert file.stem == caches.path("timings", None, "a", "b").stem


@pytest.mark.parametrize("fact", GPU)
def test_a_name_tells_gpus_apart(fact, folder, gpu):
    before = caches.path("kernels")
    setattr(gpu, fact, "NVIDIA Test MIG 1g.18gb" if fact == "name" else GPU[fact] + 1)
    assert caches.path("kernels") != before


@pytest.mark.parametrize("fact", ["FLAVOUR", "VERSION", "driver_version"])
def test_a_name_tells_software_apart(fact, folder, gpu, monkeypatch):
    before = caches.path("kernels")
    monkeypatch.setattr(caches, fact, (lambda: "1.2.3") if fact == "driver_version" else "1.2.3")
    assert caches.path("kernels") != before


def test_no_name_without_gpu_or_folder(folder, gpu, monkeypatch):
    assert caches.path("kernels") is not None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert caches.path("kernels") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    assert caches.path("kernels") is None


def test_a_digest_is_of_every_byte(monkeypatch):
    monkeypatch.setattr(caches, "CHUNK", 100)
    data = bytes(range(250))
    flipped = [data[:i] + bytes([data[i] ^ 1]) + data[i + 1 :] for i in range(250)]
    others = [data[:-1], data[:200], data + b"x", data[100:200] + data[:100] + data[200:], b"", *flipped]
    assert len({caches.digest(x) for x in [data, *others]}) == 1 + len(others)
    assert caches.digest(data) == caches.digest(bytes(range(250)))


# Files ---------------------------------------------------------------------------------------------------------------


def test_read_what_was_written(folder):
    file = folder / "a.kernels"
    assert caches.read(file) is None
    for content in (b"", b"some", bytes(range(256)) * 99):
        assert caches.write(file, content)
        assert caches.read(file) == content
    assert [f.name for f in folder.iterdir()] == ["a.kernels"]


def test_files_are_read_in_pieces(folder, monkeypatch):
    monkeypatch.setattr(caches, "CHUNK", 7)
    whole, file = bytes(range(40)), folder / "a.engine"
    for cuts in ((40, 40), (0, 0), (1, 8), (7, 14), (6, 35), (20, 22)):
        assert caches.write(file, whole[: cuts[0]], whole[cuts[0] : cuts[1]], memoryview(whole)[cuts[1] :])
        assert caches.read(file) == whole
        sealed = file.read_bytes()
        for at in (0, 33, 39, 46, 71):
            file.write_bytes(sealed[:at] + bytes([sealed[at] ^ 1]) + sealed[at + 1 :])
            assert caches.read(file) is None, (cuts, at)
        for damaged in (sealed[:-1], sealed + b"x", sealed[:39] + sealed[46:53] + sealed[39:46] + sealed[53:], b""):
            file.write_bytes(damaged)
            assert caches.read(file) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:20],
        lambda data: data[:-1],
        lambda data: data + b"x",
        lambda data: data[:50] + bytes([data[50] ^ 1]) + data[51:],
        lambda data: b"somebody else's " * 9,
    ],
    ids=["empty", "short", "truncated", "longer", "flipped", "foreign"],
)
def test_a_damaged_file_is_none(damage, folder):
    file = folder / "a.kernels"
    caches.write(file, bytes(range(100)))
    file.write_bytes(damage(file.read_bytes()))
    assert caches.read(file) is None


def test_an_unusable_folder_is_no_cache(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for where in (tmp_path / "file", tmp_path / "file" / "deeper", Path("/proc/nowhere")):
        assert caches.write(where / "a.kernels", b"some") is False
        assert caches.read(where / "a.kernels") is None
        with caches.locked(where):
            pass


@pytest.mark.skipif(os.name == "nt" or not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may do everything")
def test_a_read_only_folder_is_read(folder):
    caches.write(folder / "a.kernels", b"some")
    folder.chmod(0o500)
    assert caches.read(folder / "a.kernels") == b"some"
    assert caches.write(folder / "a.kernels", b"other") is False
    folder.chmod(0o700)
    assert caches.read(folder / "a.kernels") == b"some"


def test_readers_see_whole_files(folder):
    file, contents = folder / "a.kernels", [bytes([i]) * 300_000 for i in range(4)]
    caches.write(file, contents[0])

    def write(content):
        return all(caches.write(file, content) for _ in range(25))

    with ThreadPoolExecutor(4) as pool:
        writers = [pool.submit(write, content) for content in contents]
        while not all(w.done() for w in writers):
            assert caches.read(file) in contents
        assert all(w.result() for w in writers)
    assert [f.name for f in folder.iterdir()] == ["a.kernels"]


def test_the_least_recently_used_go(folder, monkeypatch):
    monkeypatch.setattr(caches, "LIMIT", 3500)
    for age, name in enumerate(("c.kernels", "b.timings", "a.kernels")):
        caches.write(folder / name, bytes(900))
        os.utime(folder / name, (0, 1000 - age))
    (folder / "tmp.partial").write_bytes(bytes(900))  # of a process that was killed
    os.utime(folder / "tmp.partial", (0, 500))
    (folder / "other").write_bytes(bytes(9000))  # not ours
    assert caches.read(folder / "a.kernels") == bytes(900)  # used now
    caches.write(folder / "d.kernels", bytes(900))
    assert {f.name for f in folder.iterdir()} == {"a.kernels", "c.kernels", "d.kernels", "other"}
    caches.write(folder / "e.kernels", bytes(9000))
    assert {f.name for f in folder.iterdir()} == {"e.kernels", "other"}


def test_locked_keeps_others_out(folder):
    inside, most = [0], [0]

    def work():
        for _ in range(10):
            with caches.locked(folder):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1

    at_once([work] * 4)
    assert most == [1]


def test_a_lock_that_is_never_given_back(folder, monkeypatch):
    monkeypatch.setattr(caches, "PATIENCE", 0.1)
    with caches.locked(folder):
        start = time.monotonic()
        with caches.locked(folder):
            assert time.monotonic() - start >= 0.1


# TensorRT's builder --------------------------------------------------------------------------------------------------


class Timings:
    """As `ITimingCache`: what was measured on one kind of GPU."""

    def __init__(self, gpu, measured):
        self.gpu, self.measured = gpu, measured

    def serialize(self):
        return json.dumps([self.gpu, self.measured], sort_keys=True).encode()

    def combine(self, other, ignore_mismatch):
        assert ignore_mismatch is False
        if other.gpu != self.gpu:
            return False
        self.measured = {**other.measured, **self.measured}
        return True


class Config:
    """As `IBuilderConfig`: takes timing caches of its GPU and builds with the last one it took."""

    def __init__(self, gpu="mine"):
        self.gpu, self.cache = gpu, None

    def create_timing_cache(self, blob):
        if not blob:
            return Timings(self.gpu, {})
        try:
            return Timings(*json.loads(blob))
        except ValueError:
            return None

    def set_timing_cache(self, cache, ignore_mismatch):
        assert ignore_mismatch is False
        if cache.gpu != self.gpu:
            return False
        self.cache = cache
        return True

    def build(self, *layers):
        """How many of the layers had to be measured."""
        new = [layer for layer in layers if layer not in self.cache.measured]
        self.cache.measured.update({layer: len(layer) for layer in new})
        return len(new)


def test_measured_once(folder, gpu):
    for layers, new in ((["a", "b"], 2), (["b", "c"], 1), (["a", "b", "c"], 0)):
        config = Config()
        timings = TimingCache(config)
        assert config.build(*layers) == new
        timings.save()
    (file,) = folder.glob("*.timings")
    written = file.stat().st_ino
    timings = TimingCache(Config())
    timings.save()
    assert file.stat().st_ino == written  # nothing new, nothing written


def test_builds_at_the_same_time_lose_nothing(folder, gpu):
    builds = []
    for layers in (["a", "b"], ["b", "c"], ["d"]):
        config = Config()
        builds.append(TimingCache(config))
        config.build(*layers)
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(TimingCache.save, builds))
    config = Config()
    TimingCache(config)
    assert config.build("a", "b", "c", "d") == 0


@pytest.mark.parametrize("content", [b"{", Timings("another", {"a": 1}).serialize()], ids=["damaged", "foreign"])
def test_what_tensorrt_refuses_is_measured_anew(content, folder, gpu):
    caches.write(caches.path("timings"), content)
    config = Config()
    timings = TimingCache(config)
    assert config.build("a") == 1
    caches.write(caches.path("timings"), content + b" ")  # and it comes back meanwhile
    timings.save()
    assert caches.read(caches.path("timings")) == Timings("mine", {"a": 1}).serialize()


def test_no_timings_without_a_folder(gpu, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    config = Config()
    TimingCache(config).save()
    assert config.cache is None  # TensorRT has one of its own then


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # TensorRT for RTX has timing caches that do nothing
def test_a_build_keeps_its_timings(folder, gpu, monkeypatch):
    """With TensorRT's own objects, also those of TensorRT for RTX."""
    monkeypatch.setattr("torch2rt.engine.build.builds_without_gpu", lambda: False)
    monkeypatch.setattr("torch2rt.engine.build.has_timing_cache", lambda: True)
    network = lower(trace(torch.nn.Conv2d(3, 4, 3).eval(), [torch.randn(1, 3, 8, 8)]))
    seen = []
    assert build(network, progress=False, configure=lambda config: seen.append(config.get_timing_cache()))
    assert isinstance(seen[0], trt.ITimingCache)
    content = caches.read(caches.path("timings"))
    assert content
    assert build(network, progress=False)
    assert caches.read(caches.path("timings")) == content


@pytest.mark.skipif(not IS_RTX, reason="about TensorRT for RTX")
def test_rtx_measures_nothing(folder, gpu):
    network = lower(trace(torch.nn.ReLU(), [torch.randn(2, 3)]))
    assert build(network, compute_capabilities=["8.9"], progress=False)
    assert not folder.exists()


# TensorRT for RTX's kernels ------------------------------------------------------------------------------------------


class Kernels:
    """As `IRuntimeCache`: `deserialize` says whether it could, and leaves half of it behind if not."""

    def __init__(self):
        self.names = []

    def serialize(self):
        return json.dumps(self.names).encode()

    def deserialize(self, blob):
        self.names = ["half"]
        try:
            self.names = json.loads(blob)
        except ValueError:
            return False
        return True

    def reset(self):
        self.names = []


class Engine:
    def create_runtime_config(self):
        return self

    def create_runtime_cache(self):
        return Kernels()


@pytest.fixture
def kernels(folder, gpu, monkeypatch):
    monkeypatch.setattr("torch2rt.runtime.kernel_cache.has_runtime_cache", lambda: True)
    return lambda engine_bytes=b"engine": KernelCache(Engine(), engine_bytes, torch.device("cpu"))


def test_compiled_once(kernels, folder):
    first = kernels()
    assert first.cache.names == [] and not folder.exists()
    first.cache.names.append("conv")
    first.save()
    assert kernels().cache.names == ["conv"]
    assert kernels(b"another engine").cache.names == []
    written = first.path.stat().st_ino
    first.save()
    assert first.path.stat().st_ino == written  # nothing new, nothing written
    first.cache.names.append("matmul")
    first.save()
    assert kernels().cache.names == ["conv", "matmul"]


@pytest.mark.parametrize("content", [b"{", b""])
def test_kernels_that_tensorrt_refuses_are_compiled_anew(content, kernels):
    caches.write(kernels().path, content)
    again = kernels()
    assert again.cache.names == []
    again.cache.names.append("conv")
    again.save()
    assert kernels().cache.names == ["conv"]


def test_kernels_without_a_folder(kernels, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    cache = kernels()
    cache.cache.names.append("conv")
    cache.save()
    assert cache.path is None


def test_kernels_in_an_unusable_folder(kernels, folder):
    folder.write_text("in the way")
    cache = kernels()
    cache.cache.names.append("conv")
    cache.save()
    assert kernels().cache.names == []


def test_no_kernels_are_kept_without_rtx(kernels, monkeypatch):
    monkeypatch.setattr("torch2rt.runtime.kernel_cache.has_runtime_cache", lambda: False)
    cache = kernels()
    cache.save()
    assert cache.cache is None


@pytest.mark.skipif(not IS_RTX, reason="about TensorRT for RTX")
def test_kernels_of_tensorrt(folder, device):
    if device.type != "cuda":
        pytest.skip("an engine is only deserialized where there is a GPU")
    network = lower(trace(torch.nn.Conv2d(3, 4, 3).eval().to(device), [torch.randn(1, 3, 8, 8, device=device)]))
    engine_bytes = build(network, progress=False).data
    engine = trt.Runtime(network.builder.logger).deserialize_cuda_engine(engine_bytes)
    first = KernelCache(engine, engine_bytes, device)
    assert create_execution_context(engine, torch.cuda.get_device_capability(), first.cache) is not None
    first.save()
    again = KernelCache(engine, engine_bytes, device)
    assert again.saved == first.saved == caches.read(first.path) != b""
    first.path.write_bytes(b"damaged")
    assert KernelCache(engine, engine_bytes, device).saved == b""
