import dataclasses
import importlib
import json
import os
import re
import sys
import time
from pathlib import Path

import pytest
import torch

from torch2rt.bench import benchmark as bench
from torch2rt.bench import report
from torch2rt.bench import runners as ways
from torch2rt.bench import worker as measuring
from torch2rt.bench.benchmark import Job, benchmark
from torch2rt.bench.models import Failure, UsageError
from torch2rt.bench.runners import WAYS
from torch2rt.bench.worker import Measurement
from torch2rt.cli.main import main

FAKES = """
import contextlib
import os
import signal
import sys
import time

import torch

from torch2rt.bench.runners import Way, eager, plain


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return {"y": self.linear(x), "z": None}


def zeros():
    net = Net()
    torch.nn.init.zeros_(net.linear.weight)
    torch.nn.init.zeros_(net.linear.bias)
    return net


def when_real(act):
    # the small module that a process gets ready with has another input
    return lambda module, inputs: act(module) if inputs[0].dim() == 2 else module


@contextlib.contextmanager
def unable(run, inputs):
    raise NotImplementedError("no graphs here\\nnor anywhere")
    yield


def refuse(module):
    raise ValueError("first line\\nsecond line")


def doubled(module):
    print("a library prints this on stdout")
    print('{"way": "doubled", "latency": 0}', flush=True)
    return lambda x: {"y": module(x)["y"] * 2, "z": None}


def abort(module):
    print("about to abort", file=sys.stderr, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def leave(module):
    os._exit(3)


@contextlib.contextmanager
def abort_later(run, inputs):
    if inputs[0].dim() == 2:
        leave(run)
    yield lambda: run(*inputs)


def sleep(module):
    time.sleep(600)


def tell_folders(module):
    names = ("TORCH2RT_CACHE", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    folders = [os.environ[name] for name in names]
    assert len({os.path.dirname(folder) for folder in folders}) == 1 and os.listdir(folders[0]) == []
    raise ValueError(" ".join(map(os.path.basename, folders)))


FOLDERS = Way(when_real(tell_folders), {"folders": plain})
GOOD = Way(eager, {"good": plain})
REFUSES = Way(when_real(refuse), {"refuses": plain, "refuses + graph": plain})
DOUBLED = Way(when_real(doubled), {"doubled": plain})
ABORTS = Way(when_real(abort), {"aborts": plain})
LATER = Way(eager, {"half": plain, "half + graph": unable, "second": abort_later})
SLEEPS = Way(when_real(sleep), {"sleeps": plain})
"""
NUMBERS = ("latency", "throughput", "host", "build", "memory", "error")


@pytest.fixture(scope="module")
def fakes(tmp_path_factory):
    """A module with a model and ways that run on the CPU, importable here and in the processes."""
    folder = tmp_path_factory.mktemp("fakes")
    (folder / "fakes_of_bench.py").write_text(FAKES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        yield lambda *names: [f"fakes_of_bench:{name}" for name in names]
        sys.modules.pop("fakes_of_bench", None)


def run(names, timeout=120.0, dtype="float32"):
    job = Job("fakes_of_bench:Net", [((5, 4), dtype)], dtype)
    lines = []
    found = benchmark(job, names, device="cpu", timeout=timeout, say=lines.append)
    return {m.way: m for m in found}, lines


# Processes -----------------------------------------------------------------------------------------------------------


def test_every_fate_of_a_process_is_a_row(fakes, monkeypatch):
    monkeypatch.setenv("TORCH2RT_CACHE", "/elsewhere")
    names = fakes("LATER", "REFUSES", "DOUBLED", "ABORTS", "FOLDERS")
    found, lines = run(names)
    assert list(found) == [
        "half",
        "half + graph",
        "second",
        "refuses",
        "refuses + graph",
        "doubled",
        "aborts",
        "folders",
    ]
    m = found["half"]
    assert m.failure is None
    assert all(isinstance(getattr(m, field), float) for field in NUMBERS)
    assert 0 < m.latency < 1e3 and 0 < m.host < 1e6 and 0 < m.build < 60 and m.throughput > 5 and m.error < 1e-6
    assert found["doubled"].error == pytest.approx(1.0, rel=1e-3)
    failures = {way: m.failure for way, m in found.items() if m.failure is not None}
    assert all(getattr(found[way], field) is None for way in failures for field in NUMBERS)
    assert failures["half + graph"] == "NotImplementedError: no graphs here"
    assert failures["refuses"] == failures["refuses + graph"] == "ValueError: first line"
    assert failures["aborts"] == "the process ended with signal 9: about to abort"
    assert failures["second"].startswith("the process ended with exit code 3")
    own = "torch2rt_cache torchinductor_cache_dir triton_cache_dir tmpdir"
    assert failures["folders"] == f"ValueError: {own}"
    assert any("second line" in line and "Traceback" in line for line in lines)  # the whole story is told aside


def test_a_process_that_takes_too_long_is_ended(fakes):
    start = time.monotonic()
    found, _ = run(fakes("SLEEPS"), timeout=4.0)
    assert found["sleeps"].failure.startswith("timeout: it took too long to ")
    assert time.monotonic() - start < 120


@pytest.mark.parametrize(
    ("actual", "expected", "found"),
    [
        ([[1.0, 2.0], [3.0]], [[1.0, 2.5], [3.0]], {"error": 0.2}),
        ([[0.0, 0.0]], [[0.0, 0.0]], {"remark": "nothing to compare: the module's output is all zero"}),
        ([[0.1, 0.0]], [[0.0, 0.0]], {"remark": "nothing to compare: the module's output is all zero"}),
        ([[1.0, 2.0]], [[1.0, torch.nan]], {"remark": "nothing to compare: the module's output is not finite"}),
        ([[1.0, torch.inf]], [[1.0, 7e4]], {"remark": "the output is not finite, the module's is"}),
        ([[]], [[]], {"remark": "nothing to compare: the module's output is empty"}),
    ],
)
def test_an_error_that_would_say_nothing_is_a_remark(actual, expected, found):
    assert measuring.compare(*([torch.tensor(x) for x in xs] for xs in (actual, expected))) == found


def test_outputs_of_another_shape_are_no_measurement():
    with pytest.raises(ValueError, match=r"the outputs have the shapes \[\(1, 3\)\], the module's \[\(5, 3\)\]"):
        measuring.compare([torch.ones(1, 3)], [torch.ones(5, 3)])


def test_processes_of_later_jobs_are_begun_early_and_get_ready_late(fakes, monkeypatch):
    """Several jobs at once: of a few samples, of many in a narrow dtype, and of a model whose outputs say nothing."""
    events, lines = [], []

    class Spy(bench.Worker):
        def __init__(self, job, folder):
            self.title = f"{job['inputs'][0][0][0]} {job['way'][-4:]}"
            events.append(f"begin {self.title}")
            super().__init__(job, folder)

        def go(self):
            events.append(f"go {self.title}")
            super().go()

        def close(self):
            if self.process.poll() is None:
                events.append(f"close {self.title}")
            super().close()

    monkeypatch.setattr(bench, "Worker", Spy)
    jobs = [
        Job("fakes_of_bench:Net", [((2, 4), "float32")]),
        Job("fakes_of_bench:Net", [((300, 4), "bfloat16")], "bfloat16"),
        Job("fakes_of_bench:zeros", [((5, 4), "float32")]),
    ]
    results = bench.benchmarks(jobs, fakes("GOOD"), together=2, device="cpu", say=lines.append)
    (few,) = next(results)
    assert few.way == "good" and few.failure is None and few.error < 1e-5
    assert [e for e in events if e.startswith("begin")] == ["begin 2 GOOD", "begin 300 GOOD", "begin 5 GOOD"]
    assert "go 5 GOOD" not in events
    (many,), (zeros,) = results
    assert many.failure is None and many.throughput > 5 * few.throughput  # samples, not calls
    assert 1e-5 < many.error < 3e-2  # against float32
    assert all(
        events.count(f"{what} {n} GOOD") == times for n in (2, 300, 5) for what, times in (("begin", 1), ("go", 2))
    )
    titles = [line.split(":")[1].split(",")[0] for line in lines if ":" in line]
    assert titles[:2] == ["Net 2x4 float32", "Net 300x4 bfloat16"]
    assert zeros.failure is None and zeros.error is None
    *_, good, note = report.table([zeros]).splitlines()
    assert good.split()[-1] == "-"
    assert note == "error - of good: nothing to compare: the module's output is all zero"


def test_what_does_not_make_sense_is_refused_before_anything_starts(fakes, monkeypatch):
    monkeypatch.setattr(bench, "Worker", lambda *a: pytest.fail("a process is started"))
    job = Job("fakes_of_bench:Net", [((5, 4), "float32")])
    for name in ("nothing", "", "no_such_module:NAME", "fakes_of_bench:NAME", "fakes_of_bench:Net"):
        with pytest.raises(UsageError, match=r"there is no way .* but eager, torch\.compile, torch2rt, onnx"):
            benchmark(job, [name], device="cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(Failure, match="needs an NVIDIA GPU"):
        benchmark(job, ["eager"])


def test_a_model_that_refuses_its_inputs_is_a_usage_error_and_leaves_no_process(fakes, monkeypatch):
    started = []
    monkeypatch.setattr(bench, "Worker", lambda *a, make=bench.Worker: started.append(make(*a)) or started[-1])
    with pytest.raises(UsageError, match="the model itself fails on float32 5x7: RuntimeError"):
        benchmark(Job("fakes_of_bench:Net", [((5, 7), "float32")]), fakes("GOOD"), device="cpu", say=lambda _: None)
    assert [worker.process.poll() is not None for worker in started] == [True]


def test_ways_that_are_not_installed_are_left_out(monkeypatch):
    find_spec = importlib.util.find_spec
    missing = {"onnx", "torch_tensorrt"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in missing else find_spec(name))
    assert bench.installed() == ["eager", "torch.compile", "torch2rt"]
    assert list(WAYS) == ["eager", "torch.compile", "torch2rt", "onnx", "torch-tensorrt"]


def test_a_job_makes_the_same_model_and_inputs_every_time(fakes):
    inputs = [((5, 4), "float16"), ((2,), "int64"), ((), "float16")]
    job = dataclasses.asdict(Job("fakes_of_bench:Net", inputs, "float16"))
    (first, xs), (second, ys) = measuring.make(job), measuring.make(job)
    assert [(x.dtype, tuple(x.shape)) for x in xs] == [
        (torch.float16, (5, 4)),
        (torch.int64, (2,)),
        (torch.float16, ()),
    ]
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    assert first.linear.weight.dtype == torch.float16 and torch.equal(first.linear.weight, second.linear.weight)


def test_the_expected_values_are_without_tf32_and_settings_come_back(fakes, monkeypatch):
    seen = []
    kinds = (torch.backends.cudnn, torch.backends.cuda.matmul)
    monkeypatch.setattr(bench, "check_inputs", lambda *a: seen.append([kind.allow_tf32 for kind in kinds]))
    before = [kind.allow_tf32 for kind in kinds]
    job = dataclasses.asdict(Job("fakes_of_bench:Net", [((5, 4), "float16")], "float16"))
    (y,) = bench.expected({**job, "device": "cpu"})
    assert y.dtype == torch.float32 and y.shape == (5, 3)
    assert seen == [[False, False]] and [kind.allow_tf32 for kind in kinds] == before


def test_onnx_plan_builds():
    pytest.importorskip("onnxscript")
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU()).eval().half()
    with torch.no_grad():
        assert ways.OnnxEngine.plan(module, [torch.randn(2, 3, 8, 8).half()]).nbytes > 1000


def test_ways_on_the_gpu(device, tmp_path, capsys):
    if device.type != "cuda":
        pytest.skip("needs --device cuda")
    file, drawn = tmp_path / "bench.json", tmp_path / "bench.png"
    names = "eager,torch.compile,torch2rt"
    arguments = ["torch.nn:Tanh", "--input", "4x1000", "--dtype", "float16", "--ways", names]
    assert main(["bench", *arguments, "--json", str(file), "--picture", str(drawn)]) == 0
    out = capsys.readouterr().out
    found = report.load(file)
    assert [m.way for m in found] == [
        "eager",
        "eager + graph",
        "torch.compile",
        "torch2rt",
        "torch2rt + graph",
        "torch2rt + graph, borrowed",
    ]
    for m in found:
        assert m.failure is None and m.way in out
        assert 0 < m.latency < 10 and 0 < m.host < 1e5 and 0 < m.build < 120 and m.error < 1e-2
        assert m.throughput > 400
        assert m.memory > 0 or "PYTEST_XDIST_WORKER" in os.environ  # the GPU's, where other tests come and go
    assert drawn.stat().st_size > 5000
    facts = json.loads(file.read_text())
    assert facts["machine"]["gpu"] == torch.cuda.get_device_name() and facts["machine"]["driver"]
    assert facts["job"]["inputs"] == [[[4, 1000], "float16"]]


# The report ----------------------------------------------------------------------------------------------------------


def measured(way, latency, **rest):
    numbers = {"throughput": 1e3 / latency, "host": 12.34, "build": 2.5, "memory": 321.4, "error": 1.24e-3}
    return Measurement(way, latency, **{**numbers, **rest})


SOME = [
    measured("eager", 3.21),
    measured("torch2rt", 1.5),
    measured("torch2rt + graph", 1.25),
    Measurement("onnx", failure="RuntimeError: no kernel"),
]


def test_the_table_has_a_line_for_each_way():
    heading, units, *lines = report.table(SOME).splitlines()
    assert re.split(r"  +", heading.strip()) == ["latency", "throughput", "host time", "build", "GPU memory", "error"]
    assert units.split() == ["ms", "samples/s", "us", "s", "MiB", "relative"]
    assert lines[2].split() == ["torch2rt", "+", "graph", "1.250", "800.0", "12.3", "2.50", "321", "1.2e-03"]
    assert re.fullmatch(r"onnx +failed: RuntimeError: no kernel", lines[3])
    assert len({len(line) for line in (heading, units, *lines[:3])}) == 1


def test_json_comes_back(tmp_path):
    job = Job("torchvision:resnet18", [((1, 3, 8, 8), "float16")], "float16")
    report.save(tmp_path / "a.json", job, bench.facts(), SOME)
    assert report.load(tmp_path / "a.json") == SOME
    data = json.loads((tmp_path / "a.json").read_text())
    assert data["job"]["model"] == "torchvision:resnet18"
    assert set(data["machine"]) == {"gpu", "driver", "cpu"}
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"].keys() & {"tensorrt", "tensorrt_rtx"}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_the_picture_is_drawn(tmp_path, suffix):
    pytest.importorskip("matplotlib")
    file = tmp_path / f"picture.{suffix}"
    report.picture(file, "a title", SOME)
    data = file.read_bytes()
    assert data.startswith(b"\x89PNG" if suffix == "png" else b"<?xml")
    report.picture(tmp_path / f"other.{suffix}", "a title", SOME[:1])
    assert (tmp_path / f"other.{suffix}").read_bytes() != data


def test_the_picture_highlights_torch2rt(tmp_path):
    pytest.importorskip("matplotlib")
    report.picture(tmp_path / "a.svg", "a title", SOME)
    text = (tmp_path / "a.svg").read_text()
    assert text.count(f"fill: {report.GREEN}") == 4  # two bars, two names
    report.picture(tmp_path / "b.svg", "a title", SOME[:1])
    assert report.GREEN not in (tmp_path / "b.svg").read_text()


# The command ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ways", "eager,flying"], "there is no way 'flying' to run a model, but eager, torch.compile"),
        (["--json", "no/folder/a.json"], "there is no folder for no/folder/a.json"),
        (["--picture", "no/folder/a.png"], "there is no folder for no/folder/a.png"),
    ],
)
def test_usage_errors_are_2(arguments, message, capsys):
    assert main(["bench", "torch.nn:Tanh", "--input", "2x3", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_picture_needs_matplotlib(monkeypatch, capsys):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert main(["bench", "torch.nn:Tanh", "--input", "2x3", "--picture", "a.png"]) == 2
    assert "pip install 'torch2rt[bench]'" in capsys.readouterr().err


@pytest.mark.parametrize(("option", "value"), [("--dtype", "int64"), ("--timeout", "soon"), ("--input", "2x")])
def test_unparsable_commands_are_2(option, value, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["bench", "torch.nn:Tanh", "--input", "2x3", option, value])
    assert option in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["bench", "torch.nn:Tanh", "--input", "2x3"]) == 1
    assert "a benchmark needs an NVIDIA GPU" in capsys.readouterr().err


def test_the_command_hands_on_what_it_was_told(monkeypatch, tmp_path, capsys):
    seen = []

    def fake(job, ways, timeout):
        seen.append((job, ways, timeout))
        return SOME

    monkeypatch.setattr(bench, "benchmark", fake)
    command = ["bench", "a:b", "--input", "2x3", "--input", "2:int64", "--dtype", "float16", "--timeout", "7"]
    assert main([*command, "--ways", "eager,onnx", "--json", str(tmp_path / "a.json")]) == 0
    job = Job("a:b", [((2, 3), "float16"), ((2,), "int64")], "float16")
    assert seen == [(job, ["eager", "onnx"], 7.0)]
    assert capsys.readouterr().out.strip() == report.table(SOME).strip()
    assert report.load(tmp_path / "a.json") == SOME
    monkeypatch.setattr(bench, "benchmark", lambda *a, **k: SOME[-1:])
    assert main(command) == 1


# benchmarks/table.py -------------------------------------------------------------------------------------------------


@pytest.fixture
def table(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    yield importlib.import_module("table")
    for name in ("table", "meter"):
        sys.modules.pop(name, None)


FACTS = {"machine": {"gpu": "NVIDIA H200", "driver": "1.2", "cpu": "x"}, "versions": {"tensorrt_rtx": "1.4.0.76"}}


def row(own=1.0, peer=1.2, build=2.0, peer_build=5.0, host=5.0, peer_host=9.0):
    return [
        measured("eager + graph", 1.1, host=peer_host),
        measured("torch2rt", 0.9, build=build),
        measured("torch2rt + graph", own, host=host),
        measured("onnx", 2.0, build=peer_build + 1),
        measured("torch-tensorrt", peer, build=peer_build),
        Measurement("onnx + graph", failure="RuntimeError: no"),
    ]


@pytest.mark.parametrize(
    ("name", "numbers", "met"),
    [
        ("resnet50", {}, [True, True]),
        ("resnet50", {"own": 1.1}, [True, True]),  # as fast is fast enough
        ("resnet50", {"own": 1.11}, [False, True]),
        ("resnet50", {"peer": 0.99}, [False, True]),
        ("resnet50", {"build": 2.5}, [True, True]),
        ("resnet50", {"build": 2.6}, [True, False]),
        ("conv + relu", {"own": 9.0}, [True, True]),  # only host time counts
        ("conv + relu", {"host": 9.1}, [False, True]),
    ],
)
def test_verdicts(table, name, numbers, met):
    assert [ok for ok, _ in table.aims({name: {1: row(**numbers)}})] == met


@pytest.mark.parametrize(("latency", "met"), [(1.1, [False, True, True]), (1.11, [False, False, True])])
def test_verdicts_with_borrowed_outputs(table, latency, met):
    found = table.aims({"resnet50": {1: [*row(own=1.2), measured("torch2rt + graph, borrowed", latency)]}})
    assert [ok for ok, _ in found] == met
    assert found[1][1].startswith(f"resnet50, batch 1: latency with borrowed outputs {latency:.3f} ms, the best other")


def test_verdicts_of_failures(table):
    ours = [m if "torch2rt" not in m.way else Measurement(m.way, failure="BuildError: no") for m in row()]
    assert table.aims({"resnet50": {16: ours}}) == [
        (False, "resnet50, batch 16: torch2rt + graph failed: BuildError: no")
    ]
    alone = [m for m in row() if "torch2rt" in m.way]
    assert table.aims({"resnet50": {16: alone}}) == []


def test_results_are_written_and_extended_on_the_same_machine_only(table, tmp_path):
    pytest.importorskip("matplotlib")
    base = table.path(tmp_path / "new", FACTS)
    assert base.name == "nvidia-h200-tensorrt-rtx-1.4.0.76"
    rows = {"resnet50": {1: row(), 16: row(own=2.0)}, "conv + relu": {1: row()}}
    table.save(base, FACTS, rows)
    table.show(base, FACTS, rows)
    file = base.with_name(base.name + ".json")
    assert table.load(file, FACTS) == rows
    assert table.load(file, {**FACTS, "versions": {"tensorrt_rtx": "1.5"}}) == {}
    text = base.with_name(base.name + ".md").read_text()
    lines = text.splitlines()
    cells = "1.100 / 1.100 | **0.900** / **0.900** | 1.000 / 2.000 | 2.000 / 2.000 | 1.200 / 1.200 | failed / failed"
    assert f"| resnet50 | {cells} |" in lines
    assert "| conv + relu | 9.0 | 12.3 | 5.0 | 12.3 | 12.3 | failed |" in lines
    assert "- resnet50, batch 1, onnx + graph: RuntimeError: no" in text
    assert "- met: resnet50, batch 1: latency 1.000 ms" in text
    assert "- missed: resnet50, batch 16: latency 2.000 ms" in text
    assert base.with_name(base.name + ".png").read_bytes().startswith(b"\x89PNG")


def test_a_run_measures_the_rows_it_is_asked_for(table, tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    asked = []

    def fake(jobs, ways, together, timeout):
        assert together == 2
        for job in jobs:
            asked.append(job.model.partition(".")[2])
            if len(asked) == 4:
                raise KeyboardInterrupt  # a run that is cut off keeps what it has
            yield row(own=7.0)[2:3] if ways == ["torch2rt"] else row()

    monkeypatch.setattr(table, "benchmarks", fake)
    monkeypatch.setattr(table, "facts", lambda: FACTS)
    results = ["--results", str(tmp_path)]
    assert table.main(["--rows", "conv + relu", *results]) == 0
    with pytest.raises(KeyboardInterrupt):
        table.main(["--rows", "bert,swin_t", *results])
    assert asked == ["conv_relu", "swin_t", "swin_t", "bert"]  # in the order of the table
    kept = table.load(table.path(tmp_path, FACTS).with_name("nvidia-h200-tensorrt-rtx-1.4.0.76.json"), FACTS)
    assert {name: list(batches) for name, batches in kept.items()} == {"swin_t": [1, 16], "conv + relu": [1]}
    out, err = capsys.readouterr()
    assert "met    conv + relu, batch 1: host time" in out
    assert re.findall(r"^(.*): \d+ s$", err, re.M) == ["conv + relu", "swin_t"]
    assert {file.suffix for file in tmp_path.iterdir()} == {".json", ".md", ".png"}
    assert table.main(["--rows", "conv + relu", "--ways", "torch2rt", *results]) == 0
    kept = table.load(table.path(tmp_path, FACTS).with_name("nvidia-h200-tensorrt-rtx-1.4.0.76.json"), FACTS)
    assert [m.latency for m in kept["conv + relu"][1]] == [1.1, 0.9, 7.0, 2.0, None, 1.2]  # in the order of WAYS
    with pytest.raises(SystemExit, match="2"):
        table.main(["--rows", "alexnet", *results])


def test_without_a_gpu_the_table_says_so(table, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert table.main(["--results", str(tmp_path)]) == 1
    assert "a benchmark needs an NVIDIA GPU" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_table_has_the_models_it_speaks_of(table):
    every = table.jobs()
    assert list(every) == [*table.VISION, "bert", "conv + relu"]
    assert {job.inputs[0][0][0] for batches in every.values() for job in batches.values()} == {1, 16}
    module, inputs = measuring.make(dataclasses.asdict(every["conv + relu"][1]))
    assert module(inputs[0]).shape == (1, 8, 30, 30)


def test_no_layer_of_the_table_is_without_effect(table):
    norm = torch.nn.BatchNorm2d(3)
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1), norm, torch.nn.Flatten(), torch.nn.Linear(48, 4)).eval()
    torch.nn.init.zeros_(model[3].weight)
    kept = model[0].weight.clone()
    table.awaken(model)
    assert all(p.abs().max() > 0.01 for p in model.parameters()) and torch.equal(model[0].weight, kept)
    x = torch.randn(8, 3, 4, 4) * 50 + 7
    table.settle(model, x)
    y = (model[:2](x) - norm.bias[:, None, None]).transpose(0, 1).flatten(1)
    assert y.mean(1).abs().max() < 1e-2 and (y.std(1) - 1).abs().max() < 2e-2
    assert norm.momentum == 0.1 and not norm.training


def test_a_model_of_the_table_tells_samples_apart_in_half_precision(table):
    job = Job("table:MODELS.mobilenet_v3_large", [((2, 3, 224, 224), "float16")], "float16")
    y = bench.expected({**dataclasses.asdict(job), "device": "cpu"})
    module, inputs = measuring.make(dataclasses.asdict(job))
    with torch.no_grad():
        assert 1e-5 < measuring.compare([module(*inputs)], y)["error"] < 5e-2
    assert (y[0][0] - y[0][1]).abs().max() > 0.02 * y[0].abs().max()


# benchmarks/breakdown.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def breakdown(table):
    yield importlib.import_module("breakdown")
    sys.modules.pop("breakdown", None)


def test_steps_and_kernels_are_shown(breakdown):
    steps = {step: (1.0 + i, 2.5) for i, step in enumerate(breakdown.STEPS)}
    kernels = [("long", 1, 10.0), ("short", 4, 2.0), ("tiny", 1, 0.5)]
    row = {"layers": 7, "steps": steps, "kernels": kernels}
    lines = breakdown.show_steps({"net, batch 1": row}).splitlines()
    assert lines[2].startswith("| net, batch 1 | 7 | 1.00 / 2.50 | 2.00 / 2.50 |") and lines[2].endswith("| 21.00 |")
    assert len({line.count("|") for line in lines}) == 1
    shown = [line.split() for line in breakdown.show_kernels(row, 2).splitlines()]
    assert [" ".join(words) for words in shown] == ["12.5 us 6 x all", "10.0 us 1 x long", "2.0 us 4 x short"]


def test_a_breakdown(breakdown, device, capsys):
    if device.type != "cuda" and torch.cuda.is_available():
        pytest.skip("needs --device cuda")
    with pytest.raises(SystemExit):
        breakdown.main(["--rows", "nothing"])
    capsys.readouterr()
    status = breakdown.main(["--rows", "conv + relu", "--batch", "1,16"])
    out, err = capsys.readouterr()
    if device.type != "cuda":
        assert status == 1 and "needs an NVIDIA GPU" in err
        return
    assert status == 0 and "conv + relu, batch 1\n" in out and "batch 16" not in out
    assert " us " in out and "| conv + relu, batch 1 | 2 |" in out
