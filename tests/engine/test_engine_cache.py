"""Engines that are kept: a second conversion builds none, gives the same, and never takes another module's engine."""

import dataclasses
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torch2rt import AccuracyError, Torch2RTError, torch2rt
from torch2rt.backend import disk_cache
from torch2rt.cli.main import main
from torch2rt.conversion import conversion, fallback, partitioner
from torch2rt.engine import build as build_file
from torch2rt.engine import engine_cache
from torch2rt.engine.engine_cache import EARLIER
from torch2rt.engine.weights import FACT, told
from torch2rt.tracing import trace as trace_file

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("TORCH2RT_CACHE_ENGINES")
    return tmp_path / "cache"


def kept(folder):
    """The engines in a folder, which on a GPU has kernels, too."""
    return sorted(folder.glob("*.engine"))


@pytest.fixture
def builds(monkeypatch):
    """How often TensorRT has built an engine."""
    found, serialize = [], build_file._serialize
    monkeypatch.setattr(build_file, "_serialize", lambda *args: found.append(1) or serialize(*args))
    return found


def module():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()


def stages(*args, **options):
    found = []
    model_trt = torch2rt(*args, on_stage=lambda name, result, seconds: found.append(name), **options)
    return model_trt, found


def test_the_second_conversion_builds_nothing(folder, builds):
    first, stages_of_first = stages(module(), [X])
    second, stages_of_second = stages(module(), [X])
    assert stages_of_first == ["trace", "lower", "build"] and stages_of_second == ["trace", "build"]
    assert len(builds) == 1 and len(kept(folder)) == 1
    assert second.engine_bytes == first.engine_bytes and second.interface == first.interface
    assert str(second.report) == f"{first.report}\n  {EARLIER}" and second.report.verified.mode == "example"
    assert second.made_by == first.made_by and second.built.facts == first.built.facts


def test_the_network_is_made_when_it_is_asked_for(folder, builds):
    torch2rt(module(), [X])
    ours = module()
    model_trt = torch2rt(ours, [X])
    assert torch.allclose(model_trt.reference()(X), ours(X)) and model_trt.network.num_layers
    torch2rt(nn.Linear(3, 1), [X], keep_network=False)
    assert torch2rt(module(), [X], keep_network=False).network is None


@torch.no_grad()
def test_a_network_of_other_weights_is_refused(folder):
    torch2rt(module(), [X])
    ours = module()
    model_trt = torch2rt(ours, [X])
    ours[0].bias += 1
    with pytest.raises(Torch2RTError, match="not as it was when it was converted"):
        model_trt.reference()


def test_the_network_needs_no_module(folder, builds):
    expected = [torch2rt(module(), [X], max_batch_size=4).reference()(X) for _ in range(2)]
    assert len(builds) == 1 and torch.equal(*expected)


def changed_weight():
    changed = module()
    with torch.no_grad():
        changed[2].weight[1, 2] += 1e-6
    return changed


OTHERS = {
    "weight": lambda: (changed_weight(), {}),
    "order": lambda: (nn.Sequential(*(module()[i] for i in (0, 2, 1))), {}),
    "range": lambda: (module(), dict(max_batch_size=4)),
    "opt": lambda: (module(), dict(max_batch_size=4, opt_shapes=[(3, 3)])),
    "names": lambda: (module(), dict(input_names=["other"])),
    "precision": lambda: (module(), dict(precision="fp16")),
    "level": lambda: (module(), dict(optimization_level=1)),
    "workspace": lambda: (module(), dict(max_workspace_size=1 << 20)),
    "target": lambda: (module(), dict(compute_capabilities=["8.6", "8.9"])),
    "nan": lambda: (module(), dict(nan="ignore")),
    "passes": lambda: (module(), dict(passes=[lambda graph: graph])),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_differs_has_a_file_of_its_own(name, folder, monkeypatch):
    class Found(Exception):
        pass

    def read(file):
        raise Found(file)

    def file_of(module, options):
        with pytest.raises(Found) as raised:
            torch2rt(module, [X], **options)
        return raised.value.args[0]

    monkeypatch.setattr(engine_cache, "read", read)
    other, options = OTHERS[name]()
    ours, theirs = file_of(module(), {}), file_of(other.eval(), options)
    is_same = name == "passes"  # which changes nothing, so that the graph is the same
    assert ours is not None and theirs is not None and (ours == theirs) == is_same


def test_the_surroundings_are_in_the_key(folder, monkeypatch):
    def file():
        graph = torch2rt_graph()
        return engine_cache.file_of(graph, {})

    def torch2rt_graph():
        from torch2rt.tracing.trace import trace

        return trace(module(), [X])

    before = {file()}
    assert before == {file()}
    for name in ("VERSION", "FLAVOUR"):
        with monkeypatch.context() as context:
            context.setattr(engine_cache, name, "other")
            before.add(file())
    with monkeypatch.context() as context:
        context.setattr(engine_cache, "own_code", lambda: "other")
        before.add(file())
    with monkeypatch.context() as context:
        context.setenv("NVIDIA_TF32_OVERRIDE", "1")
        before.add(file())
    with monkeypatch.context() as context:
        context.setattr(torch, "__version__", "9.9")
        before.add(file())
    assert len(before) == 6


def test_nothing_is_kept_where_it_must_not_be(folder, builds, monkeypatch):
    torch2rt(module(), [X], configure=lambda config: None)
    monkeypatch.setenv("TORCH2RT_CACHE_ENGINES", "0")
    torch2rt(module(), [X])
    monkeypatch.delenv("TORCH2RT_CACHE_ENGINES")
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    torch2rt(module(), [X])
    assert len(builds) == 3 and not kept(folder)


def test_a_wrong_engine_is_not_kept(folder, monkeypatch):
    from torch2rt.converters import activation

    right = activation.trt.ActivationType.RELU
    monkeypatch.setattr(activation.trt.ActivationType, "RELU", activation.trt.ActivationType.SIGMOID)
    try:
        with pytest.raises(AccuracyError):
            torch2rt(module(), [X])
    finally:
        monkeypatch.undo()
    assert right == activation.trt.ActivationType.RELU and not kept(folder)


def test_what_was_not_verified_is_verified_when_asked(folder, builds):
    assert torch2rt(module(), [X], verify=False).report.verified is None
    assert torch2rt(module(), [X]).report.verified.mode == "example"
    assert torch2rt(module(), [X], verify=False).report.verified.mode == "example"
    ranged = torch2rt(module(), [X], verify="range")
    assert ranged.report.verified.mode == "range" and len(builds) == 1
    _, names = stages(module(), [X], verify="range")
    assert names == ["trace", "build"]


def test_several_engines(folder, builds):
    class ByParity(nn.Module):
        def __init__(self):
            super().__init__()
            self.even, self.odd = nn.Linear(3, 4), nn.Linear(3, 4)

        def forward(self, x):
            return self.even(x) if x.shape[0] % 2 == 0 else self.odd(x) * 2

    ours = ByParity().eval()
    first = torch2rt(ours, [X], max_batch_size=4)
    second = torch2rt(ours, [X], max_batch_size=4)
    assert len(builds) == 2 and second.engine_bytes == first.engine_bytes
    assert str(second.report).replace(f"  {EARLIER}\n", "") == str(first.report) != str(second.report)
    assert second.built.variants == first.built.variants
    for rows in (1, 2):
        assert torch.allclose(second.reference()(X[:rows]), ours(X[:rows]))


class Parts(nn.Module):
    """Two engines, and a call of torch's between them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = torch.tanh(self.first(x)) * 2 + 1
        rows = y[y[:, 0] > 0.5]
        return self.last(y * torch.linalg.svdvals(y)[0]).softmax(-1), rows.exp() * 3


IN_PARTS = dict(fallback=True, min_segment_calls=1, max_batch_size=4)


@pytest.fixture
def work(monkeypatch):
    """How often modules are traced, and graphs lowered."""
    found = {"traces": 0, "lowered": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            found[name] += 1
            return function(*args, **kwargs)

        return call

    for file in (fallback, partitioner):
        monkeypatch.setattr(file, "lower", counted("lowered", file.lower))
    monkeypatch.setattr(conversion, "_lower", counted("lowered", conversion._lower))
    monkeypatch.setattr(trace_file, "run_traced", counted("traces", trace_file.run_traced))
    return found


def test_engines_of_a_module_in_segments_are_kept(folder, builds, work):
    first = torch2rt(Parts(), [X], **IN_PARTS)
    count, of_first = len(builds), dict(work)
    assert count == len(first.engines) >= 2 and of_first["lowered"] > count
    ours = Parts()
    second, stages_of_second = stages(ours, [X], **IN_PARTS)
    assert len(builds) == count and work["lowered"] == of_first["lowered"]
    assert work["traces"] - of_first["traces"] <= of_first["traces"]
    assert stages_of_second == ["trace", "lower", "build"]
    assert [e.engine_bytes for e in second.engines] == [e.engine_bytes for e in first.engines]
    assert second.schedule == first.schedule and second.interface == first.interface
    assert str(second.report).replace(f"\n  {EARLIER}", "") == str(first.report)
    for rows in (2, 4):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(second.reference()(x), ours(x))
    assert torch2rt(Parts(), [X], keep_network=False, **IN_PARTS).network is None and len(builds) == count


@torch.no_grad()
def test_what_differs_of_a_module_in_segments_is_another_engine(folder, builds):
    torch2rt(Parts(), [X], **IN_PARTS, verify=False)
    count = len(builds)
    assert torch2rt(Parts(), [X], **IN_PARTS).report.verified is not None and len(builds) == count
    changed = Parts()
    changed.last.bias += 1
    model_trt = torch2rt(changed, [X], **IN_PARTS)
    torch.testing.assert_close(model_trt.reference()(X), changed(X))
    assert len(builds) == count + 1  # the other engines are those of before
    (record, *_) = sorted(folder.glob("*.segments"))
    other = torch2rt(Parts(), [X], **{**IN_PARTS, "torch_executed": ["last"]})
    assert len(other.engines) > len(model_trt.engines) and len(list(folder.glob("*.segments"))) > 2
    for file in folder.glob("*.segments"):
        file.write_bytes(file.read_bytes()[:-3])
    count = len(builds)
    again = torch2rt(Parts(), [X], **IN_PARTS)
    assert len(builds) == count and again.report.segments and record.exists()
    later = Parts()
    model_trt = torch2rt(later, [X], **IN_PARTS)
    later.last.bias += 1
    with pytest.raises(Torch2RTError, match="not as it was when it was converted"):
        model_trt.reference()


class Values(nn.Module):
    def forward(self, x):
        return torch.tanh(x * 2 + 1) * torch.linalg.svdvals(x)[0]


@pytest.mark.parametrize("draws", [False, True])
def test_what_is_refused_is_traced_and_lowered_once(builds, work, draws):
    class Drawn(Values):
        def forward(self, x):
            torch.rand(3)  # of no result, but the next numbers are others
            return super().forward(x)

    model_trt = torch2rt(Drawn() if draws else Values(), [X], fallback=True, min_segment_calls=1, verify=False)
    assert work == {"traces": 2 if draws else 1, "lowered": (2 if draws else 1) + len(model_trt.engines)}
    assert any("rand" in line for line in model_trt.report.segments) == draws


def test_what_can_be_refitted(folder, builds):
    ours = module()
    torch2rt(ours, [X], refittable=True)
    model_trt, names = stages(ours, [X], refittable=True)
    assert names == ["trace", "lower", "build"] and len(builds) == 1
    with torch.no_grad():
        ours[0].weight *= 2
    model_trt.refit()
    assert torch.allclose(model_trt.reference()(X), ours(X), atol=1e-6)


# Damage --------------------------------------------------------------------------------------------------------------


def test_damage_is_found_wherever_it_is(folder, caplog):
    torch2rt(module(), [X])
    (file,) = kept(folder)
    whole = file.read_bytes()
    generator = torch.Generator().manual_seed(5)
    places = torch.randint(len(whole), (12,), generator=generator).tolist()
    flipped = [
        whole[:i] + bytes([whole[i] ^ 1 << i % 8]) + whole[i + 1 :] for i in (0, 40, 100, len(whole) - 1, *places)
    ]
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], whole + b"x", whole[64:], *flipped):
        file.write_bytes(damaged)
        caplog.clear()
        with caplog.at_level(logging.WARNING, "torch2rt"):
            assert engine_cache.read(file) is None
        assert str(file) in caplog.text and "built again" in caplog.text and not file.exists()
    file.write_bytes(damaged)
    built = torch2rt(module(), [X])
    assert engine_cache.read(file).data == built.engine_bytes and file.read_bytes()[32:96] == whole[32:96]


def test_a_file_under_anothers_name(folder, caplog):
    torch2rt(module(), [X])
    (file,) = kept(folder)
    other = file.with_name("0" * 64 + ".engine")
    file.rename(other)
    assert engine_cache.read(other) is None and "another's" in caplog.text


def test_engines_of_another_version(folder, monkeypatch, caplog):
    torch2rt(module(), [X])
    (file,) = kept(folder)
    monkeypatch.setattr(engine_cache, "VERSION", "0.1")
    assert engine_cache.read(file) is None and "another TensorRT" in caplog.text


def test_the_limit_is_for_engines_too(folder, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE_LIMIT", "0.0002")
    for width in (3, 4, 5, 6):
        torch2rt(nn.Linear(3, width), [X], verify=False)
    total = sum(file.stat().st_size for file in kept(folder))
    assert 0 < total <= max(disk_cache.limit(), *(file.stat().st_size for file in kept(folder)))
    monkeypatch.setenv("TORCH2RT_CACHE_LIMIT", "much")
    assert disk_cache.limit() == disk_cache.LIMIT


PROCESSES = """
import os, sys
import torch
from torch import nn
from torch2rt import torch2rt
from torch2rt.backend import disk_cache
from torch2rt.registry import load

def convert(number):
    for seed in (number % 3, 3):
        torch.manual_seed(seed)
        module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval(), torch.ones(2, 3)
        reference = torch2rt(module, [x], verify=False).reference()
        assert torch.allclose(reference(x), module(x)), "wrong"
    use(number)

def use(number):
    # writes, reads and removes files beside others that do
    where, own = disk_cache.folder(), disk_cache.of_key("kernels", str(number))
    for turn in range(40):
        content = bytes([turn]) * 2000
        assert disk_cache.write(own, content, str(number).encode())
        found = disk_cache.read(own)
        assert found is None or bytes(found) == content + str(number).encode(), "wrong"
        other = disk_cache.read(disk_cache.of_key("kernels", str(turn)))
        assert other is None or bytes(other[2000:]) == str(turn).encode(), "another's"
        with disk_cache.locked(where):
            disk_cache.files(where)

load()  # imported once: a process each takes seconds to import torch
count, at_once, work = int(sys.argv[1]), int(sys.argv[2]), {"convert": convert, "use": use}[sys.argv[3]]
started, ended = [], []
for number in range(count):
    if len(started) - len(ended) == at_once:
        ended.append(os.wait()[1])
    if not (pid := os.fork()):
        try:
            work(number)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    started.append(pid)
while len(ended) < count:
    ended.append(os.wait()[1])
print(ended)
"""


def in_processes(folder, count, at_once, work, **environment):
    environment = {**os.environ, "TORCH2RT_CACHE": str(folder), "OMP_NUM_THREADS": "1", **environment}
    environment.pop("TORCH2RT_CACHE_ENGINES", None)
    command = [sys.executable, "-c", PROCESSES, str(count), str(at_once), work]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.stdout == f"{[0] * count}\n" and "damaged" not in run.stderr, run.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_processes_share_a_folder(folder, request):
    count = request.config.getoption("--processes")
    in_processes(folder, count, 6, "convert")
    found = sorted(file.suffix for file in kept(folder))
    assert found == [".engine"] * (min(count, 3) + 1)
    assert all(engine_cache.read(file) is not None for file in kept(folder))
    assert len(list(folder.glob("*.kernels"))) == count, "none is lost"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_processes_keep_the_bound(folder, request):
    count = request.config.getoption("--processes")
    limit = count // 2 * 2100
    in_processes(folder, count, count, "use", TORCH2RT_CACHE_LIMIT=repr(limit / 2**30))
    found = disk_cache.files(folder)
    assert found and {file.suffix for file, _ in found} == {".kernels"}
    assert sum(status.st_size for _, status in found) <= limit
    assert all(bytes(disk_cache.read(file)[2000:]) == file.stem.encode() for file, _ in found)


# The command ---------------------------------------------------------------------------------------------------------


def test_the_command(folder, capsys, monkeypatch):
    assert main(["cache", "info"]) == 0 and "does not exist yet" in capsys.readouterr().out
    torch2rt(module(), [X])
    (file,) = kept(folder)
    assert main(["cache", "list"]) == 0
    out = capsys.readouterr().out
    assert file.stem[:12] in out and "engine" in out and "x: float32[2, 3]" in out.replace("input", "x")
    assert main(["cache", "info"]) == 0 and "of at most 4 GiB" in capsys.readouterr().out
    file.write_bytes(b"damaged")
    assert main(["cache", "list"]) == 0 and "damaged" in capsys.readouterr().out and file.exists()
    assert main(["cache", "clear"]) == 0 and not kept(folder)
    monkeypatch.setenv("TORCH2RT_CACHE", "")
    assert main(["cache", "list"]) == 1 and "Nothing is kept" in capsys.readouterr().err


# Engines of other weights --------------------------------------------------------------------------------------------


@pytest.fixture
def refits(monkeypatch):
    """A TensorRT that changes weights: engines say that they can have others, and note those that they are given."""
    if torch.cuda.is_available():
        pytest.skip("test_refit.py has TensorRT change weights there")
    from torch2rt.conversion import conversion
    from torch2rt.runtime import refittable

    def build(network, refittable=False, **options):
        engine, facts = build_file.build(network, **options), {FACT: [told(network)]}
        made_by = {**engine.made_by, "refittable": "all weights"}
        return dataclasses.replace(engine, made_by=made_by, facts={**engine.facts, **facts})

    given = []
    for file in (conversion, engine_cache):
        monkeypatch.setattr(file, "builds_refittable", lambda: True)
    monkeypatch.setattr(conversion, "build", build)
    monkeypatch.setattr(refittable, "load", lambda engine, index: SimpleNamespace(engine=engine, index=0))
    monkeypatch.setattr(refittable, "refit_engine", lambda pool, new, others: given.append((pool, new)) or True)
    return given


def test_one_engine_serves_all_weights(folder, builds, refits):
    first = torch2rt(module(), [X], refittable=True)
    other = changed_weight()
    model_trt, names = stages(other, [X], refittable=True)
    assert len(builds) == 1 and names == ["trace", "lower", "build"] and len(kept(folder)) == 1
    assert model_trt.plan.data == first.engine_bytes and model_trt.is_stale
    assert model_trt.report.verified is not None
    pool = model_trt._pool(0)  # it gets its weights when it is loaded
    ((refitted, weights),) = refits
    assert refitted is pool and pool.engine.data == first.engine_bytes
    assert any(torch.equal(weight, other[2].weight) for weight in weights.values())
    assert len(weights) == 1, "the others are the same"
    with torch.no_grad():
        other[0].bias += 1
    assert model_trt.refit() == ["0.bias"] and len(refits) == 2
    assert list(refits[1][1]) == ["0.linear:weights.1"] or len(refits[1][1]) == 1
    assert other[0].bias.detach().numpy().tobytes() in model_trt.engine_bytes and len(builds) == 2  # to be saved


def test_an_engine_that_has_the_weights(folder, builds, refits):
    torch2rt(module(), [X], refittable=True)
    model_trt = torch2rt(module(), [X], refittable=True)
    assert len(builds) == 1 and not model_trt.is_stale and EARLIER in model_trt.report.verified.notes
    assert model_trt._pool(0) and not refits


@pytest.mark.parametrize("facts", [{}, {FACT: []}, {FACT: [{"another": "weight"}]}, {FACT: [7]}])
def test_an_engine_with_other_names_of_weights(facts, folder, builds, refits):
    torch2rt(module(), [X], refittable=True)
    (file,) = kept(folder)
    engine_cache.write(file, dataclasses.replace(engine_cache.read(file), facts=facts))
    model_trt = torch2rt(module(), [X], refittable=True)
    assert len(builds) == 2 and not model_trt.is_stale


def test_a_structure_that_differs_is_another_engine(folder, builds, refits):
    torch2rt(module(), [X], refittable=True)
    torch2rt(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).eval(), [X], refittable=True)
    torch2rt(module(), [X])  # is not to be refitted
    assert len(builds) == 3


def test_weights_that_are_refused_are_built(folder, builds, refits, monkeypatch):
    from torch2rt.runtime import refittable

    torch2rt(module(), [X], refittable=True)
    other = changed_weight()
    model_trt = torch2rt(other, [X], refittable=True)
    monkeypatch.setattr(refittable, "refit_engine", lambda pool, new, others: False)
    pool = model_trt._pool(0)
    assert len(builds) == 2 and not model_trt.is_stale and pool.engine is model_trt.built
