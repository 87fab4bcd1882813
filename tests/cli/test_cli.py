import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from test_verification import times, wrong

import torch2rt as package
from torch2rt import TRTModule, load, torch2rt
from torch2rt.backend import tensorrt as backend
from torch2rt.bench.models import load_model
from torch2rt.cli.main import main
from torch2rt.cli.weights import load_weights

MODELS = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 3)

    def forward(self, x):
        return torch.relu(self.linear(x))


class Two(torch.nn.Module):
    def forward(self, x, y):
        return {"sum": x + y, "product": x * y}


class Branch(torch.nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


class Parity(torch.nn.Module):
    def forward(self, x):
        return x * 2 if x.shape[0] % 2 else x * 3


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


class Halves(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(4, 3), torch.nn.Linear(3, 5)

    def forward(self, x):
        values = torch.linalg.svdvals(torch.relu(self.first(x)))
        return torch.tanh(self.last(values) * 2) + 1


instance = Net()
number = 3
scope = type("scope", (), {"make": staticmethod(Net)})


def not_a_module():
    return 3


def broken():
    raise KeyError("user's own")
"""


@pytest.fixture
def models(tmp_path, monkeypatch):
    """A folder with models that are importable from the command line, as the working directory."""
    name = f"models_{abs(hash(str(tmp_path))) % 10**8}"
    (tmp_path / f"{name}.py").write_text(MODELS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return name


def test_convert_verify_and_save(models, tmp_path, capsys):
    assert main(["convert", f"{models}:Net", "--input", "2x4", "--verify", "-o", "net.engine"]) == 0
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines()]
    assert rows == ["model", "x", "trace", "lower", "build", "verify", "for", "output_0", "output_0", "saved"]
    assert re.search(r"trace +2 calls +\d+\.\d\d s", out)
    assert re.search(r"lower +\d+ layers +\d+\.\d\d s", out)
    assert re.search(r"build +\d+\.\d MiB engine +\d+\.\d\d s", out)
    assert re.search(r"output_0 +error \S+ +allowed \S+", out)
    loaded = TRTModule.from_engine(tmp_path / "net.engine")
    assert loaded.interface.inputs[0].describe() == "float32[2, 4]"
    assert loaded.report.verified.mode == "range"


@pytest.mark.parametrize("name", ["instance", "scope.make"])
def test_convert_takes_instances_and_callables(models, name):
    assert main(["convert", f"{models}:{name}", "--input", "2x4"]) == 0


def test_convert_dynamic_shapes(models, capsys):
    shapes = ["--min", "1x4", "--opt", "3x4", "--max", "5x4"]
    assert main(["convert", f"{models}:Net", "--input", "2x4", *shapes, "--verify"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x +float32\[1..5, 4\] +optimized for 3x4", out)
    assert {"2x4", "1x4", "5x4"} <= set(re.findall(r"for (\S+)", out))


@pytest.mark.parametrize(
    ("flags", "variants"),
    [
        (["--max", "6x4"], 2),
        (["--max", "6x4", "--multiple-of", "2x1"], 1),
        (["--max", "6x4", "--dynamic-shapes", "x.0=2*b:1..3"], 1),
        (["--shapes", "2x4", "--shapes", "5x4"], 2),
        (["--shapes", "2x4", "--shapes", "6x4", "--merge", "proof"], 1),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_convert_says_what_sizes_are_served(models, flags, variants, tmp_path):
    assert main(["convert", f"{models}:Parity", "--input", "2x4", *flags, "--quiet", "-o", "parity.engine"]) == 0
    run = TRTModule.from_engine(tmp_path / "parity.engine")
    assert len(run.built.each()) == variants


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--max", "6x4", "--max-variants", "1"], 1, "needs more than 1 engines"),
        (["--max", "6x4", "--shapes", "2x4"], 2, "leave out min_shapes"),
        (["--shapes", "2x4", "--plan"], 2, "leave out --shapes"),
        (["--dynamic-shapes", "x.0=b:1..3,x.1=b:1..4"], 2, "x.1 gives 'b' another range"),
        (["--dynamic-shapes", "y.0=b:1..3"], 2, "'y'"),
    ],
    ids=lambda v: " ".join(v) if isinstance(v, list) else None,
)
def test_convert_says_what_is_wrong_with_sizes(models, flags, code, message, capsys):
    assert main(["convert", f"{models}:Parity", "--input", "2x4", *flags]) == code
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("sizes", ["x", "x.0", "x.0=3", "x.0=b:1", "x.a=b", "x.0=b+1"])
def test_sizes_that_do_not_parse(models, sizes):
    with pytest.raises(SystemExit):
        main(["convert", f"{models}:Parity", "--input", "2x4", "--dynamic-shapes", sizes])


def test_convert_several_inputs_and_dtypes(models, capsys):
    inputs = ["--input", "2x3:int32", "--input", "scalar", "--max", "8x3", "--max", ""]
    assert main(["convert", f"{models}:Two", *inputs, "--verify", "--dtype", "float16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"x +int32\[2..8, 3\]", out)
    assert re.search(r"y +float16\[\]", out)
    assert len(re.findall(r"output_1 +error", out)) >= 3


def test_convert_quiet_prints_nothing(models, capsys):
    assert main(["convert", f"{models}:Net", "--input", "2x4", "--verify", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "message"),
    [("Branch", r"models_\d+\.py:\d+.*depends on the value of a tensor"), ("Unknown", "torch2rt cannot convert")],
)
def test_what_cannot_be_converted_is_1_and_no_traceback(models, name, message, capsys):
    assert main(["convert", f"{models}:{name}", "--input", "2x4"]) == 1
    err = capsys.readouterr().err
    assert err.startswith("torch2rt: ") and "Traceback" not in err
    assert re.search(message, err)


def test_a_wrong_engine_is_1_and_not_saved(models, tmp_path, capsys):
    command = ["convert", f"{models}:Net", "--input", "2x4", "-o", "net.engine"]
    with wrong(torch.relu, times(2.0)):
        assert main(command) == 1
        error = capsys.readouterr().err
        assert re.search(r"does not compute what the module does for inputs float32\[2, 4\]:\n +output_0: error", error)
        assert "torch.relu" in error and not (tmp_path / "net.engine").exists()
        assert main([*command, "--no-verify"]) == 0
    assert TRTModule.from_engine(tmp_path / "net.engine").report.verified is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--input", "2x4"], "none of torchvision:NAME"),
        (["no_such_module:f", "--input", "2x4"], "there is no module 'no_such_module' here"),
        (["MODELS:missing", "--input", "2x4"], "has no 'missing'"),
        (["MODELS:number", "--input", "2x4"], "neither an nn.Module nor callable"),
        (["MODELS:not_a_module", "--input", "2x4"], "returns a int, not an nn.Module"),
        (["torchvision:resnet81", "--input", "2x4"], "no model 'resnet81'. Did you mean"),
        (["timm:resnet81", "--input", "2x4"], "no model 'resnet81'. Did you mean"),
        (["MODELS:Net", "--input", "2x4", "--max", "3x4", "--max", "3x4"], "--max is given 2 times for 1 --input"),
        (["MODELS:Net", "--input", "2x4", "--max", "1x4"], "min 2, opt 2, max 1 are not in order"),
        (["MODELS:Net", "--input", "2x4", "--max", "3x4x1"], "the example has"),
        (["MODELS:Net", "--input", "2x5"], "the model itself fails on float32 2x5: RuntimeError: "),
        (["MODELS:Net", "--input", "2x4", "-o", "no/folder/net.engine"], "there is no folder for no/folder/net.engine"),
    ],
)
def test_usage_errors_are_2(models, arguments, message, capsys):
    if arguments[0].startswith("timm"):
        pytest.importorskip("timm")
    assert main(["convert", arguments[0].replace("MODELS", models), *arguments[1:]]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["convert", "a:b"], "--input"),
        (["convert", "a:b", "--input", "2x"], "'2x' is not a shape"),
        (["convert", "a:b", "--input", "2x-4"], "'2x-4' is not a shape"),
        (["convert", "a:b", "--input", "2x4:float8"], "'float8' is not one of float32"),
        (["convert", "a:b", "--input", "2x4", "--dtype", "int64"], "invalid choice"),
        (["fly"], "invalid choice"),
    ],
)
def test_unparsable_commands_are_2(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("MODELS:broken", 1, r"calling broken fails: KeyError: \"user's own\" \(.*models_\d+.py:\d+\)\."),
        ("unfinished:Net", 1, r"importing unfinished fails: SyntaxError: .* \(.*unfinished.py:2\)\."),
        ("needy:Net", 1, r"importing needy fails: ModuleNotFoundError: No module named 'no_such\w+' \(.*y.py:1\)\."),
        ("failing:Net", 1, r"importing failing fails: ZeroDivisionError: division by zero \(.*failing.py:1\)\."),
    ],
)
def test_the_users_own_errors_are_a_line_each(models, tmp_path, name, code, message, capsys):
    (tmp_path / "unfinished.py").write_text("import torch\nclass Net(\n")
    (tmp_path / "needy.py").write_text("import no_such_thing\n")
    (tmp_path / "failing.py").write_text("1 / 0\n")
    command = ["convert", name.replace("MODELS", models), "--input", "2x4"]
    assert main(command) == code
    err = capsys.readouterr().err
    assert re.fullmatch(rf"torch2rt: MODEL '\w+:\w+': {message}\n", err), err
    assert main([*command, "--traceback"]) == code
    assert "Traceback (most recent call last)" in capsys.readouterr().err


@pytest.mark.parametrize("output", ["folder", "folder/" + "x" * 300])
def test_what_cannot_be_written_is_told_before_anything_else(models, tmp_path, output, capsys):
    (tmp_path / "folder").mkdir()
    assert main(["convert", "no_such_module:f", "--input", "2x4", "-o", output]) == 2
    assert re.fullmatch(r"torch2rt: folder.*(is a folder|cannot be written: .*)\.\n", capsys.readouterr().err)
    assert [p.name for p in tmp_path.rglob("*.partial")] == []


def test_a_full_disk_is_a_line(models, capsys):
    if not os.path.exists("/dev/full"):
        pytest.skip("there is no /dev/full")
    assert main(["convert", f"{models}:Net", "--input", "2x4", "--quiet", "-o", "/dev/full"]) == 1
    assert capsys.readouterr().err == "torch2rt: /dev/full cannot be written: No space left on device.\n"


def test_the_builders_flags(models, tmp_path, capsys):
    flags = ["--max-workspace-size", "1e9", "--optimization-level", "1", "--log-level", "warning", "--no-tf32"]
    flags += ["--max-batch-size", "5", "--input-names", "data", "--output-names", "scores"]
    flags += ["--nan", "ignore", "--float64", "refuse"]
    if backend.IS_RTX:
        flags[flags.index("--no-tf32")] = "--tf32"
        flags += ["--compute-capabilities", "8.6,8.9"]
    assert main(["convert", f"{models}:Net", "--input", "2x4", *flags, "-o", "net.engine"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"data +float32\[1..5, 4\]", out) and re.search(r"  scores +error", out)
    loaded = TRTModule.from_engine("net.engine")
    assert loaded.input_names == ["data"] and loaded.output_names == ["scores"]
    if backend.IS_RTX:
        assert loaded.made_by["target"] == "compute capability 8.6, 8.9"
    for flags, message in [
        (["--max-batch-size", "0"], "max_batch_size=0 must be at least 1"),
        (["--optimization-level", "7"], "optimization_level=7 must be 0 to 5"),
        (["--max-workspace-size", "1.5"], "max_workspace_size=1.5 must be a whole number"),
    ]:
        assert main(["convert", f"{models}:Net", "--input", "2x4", *flags]) == 2
        assert capsys.readouterr().err == f"torch2rt: {message}.\n"


# Weights -------------------------------------------------------------------------------------------------------------


def weights_of(models):
    made = importlib.import_module(models).Net()
    torch.nn.init.constant_(made.linear.weight, 0.25)
    torch.nn.init.constant_(made.linear.bias, 7.0)
    return made


def save_safetensors(state, path):
    pytest.importorskip("safetensors.torch").save_file(state, path)


WEIGHTS = [
    torch.save,
    save_safetensors,
    lambda state, path: torch.save({"epoch": 3, "state_dict": state}, path),
    lambda state, path: torch.save({f"module.{name}": value.half() for name, value in state.items()}, path),
]


@pytest.mark.parametrize("save", WEIGHTS, ids=["state-dict", "safetensors", "checkpoint", "data-parallel"])
def test_weights_come_from_a_file(models, save, monkeypatch):
    monkeypatch.syspath_prepend(".")
    made = weights_of(models)
    save(made.state_dict(), "net.weights")
    loaded = importlib.import_module(models).Net()
    load_weights(loaded, "net.weights")
    assert torch.equal(loaded.linear.weight, made.linear.weight) and loaded.linear.weight.dtype == torch.float32
    assert main(["convert", f"{models}:Net", "--input", "2x4", "--quiet", "--weights", "net.weights"]) == 0


@pytest.mark.parametrize(
    ("save", "code", "message"),
    [
        (None, 2, "there is no file net.weights"),
        (lambda made, path: path.write_text("hello"), 1, "net.weights cannot be read as weights"),
        (lambda made, path: torch.save(made, path), 1, "net.weights is no file of tensors alone"),
        (lambda made, path: torch.save([1, 2], path), 1, "net.weights holds a list, which is no state dict"),
        (
            lambda made, path: torch.save({"linear.weight": made.linear.weight, "head": torch.ones(2)}, path),
            1,
            "net.weights does not fit the model: it has no linear.bias; it has head",
        ),
        (
            lambda made, path: torch.save({"linear.weight": torch.ones(3, 5), "linear.bias": torch.ones(3)}, path),
            1,
            r"net.weights does not fit the model: it has other shapes: linear.weight \(3, 5\) for \(3, 4\)",
        ),
    ],
    ids=["missing", "text", "module", "list", "names", "shapes"],
)
def test_weights_that_do_not_fit_are_a_line(models, tmp_path, monkeypatch, save, code, message, capsys):
    monkeypatch.syspath_prepend(".")
    if save is not None:
        save(weights_of(models), tmp_path / "net.weights")
    assert main(["convert", f"{models}:Net", "--input", "2x4", "--weights", "net.weights"]) == code
    err = capsys.readouterr().err
    assert re.fullmatch(f"torch2rt: {message}.*\n", err), err


# inspect -------------------------------------------------------------------------------------------------------------


def test_inspect_says_what_a_file_holds(models, tmp_path, capsys):
    shapes = ["--min", "1x4", "--opt", "3x4", "--max", "5x4"]
    assert main(["convert", f"{models}:Net", "--input", "2x4", *shapes, "-o", "net.engine"]) == 0
    capsys.readouterr()
    assert main(["inspect", "net.engine"]) == 0
    out = capsys.readouterr().out
    for row in (
        r"file +net.engine +\d+\.\d MiB engine",
        rf"built by +{backend.FLAVOUR} {re.escape(backend.VERSION)} +for .+",
        r"x +float32\[1..5, 4\] +optimized for 3x4",
        r"output_0 +float32\[\?, 3\]",
        r"report +verified \(example\).*",
        r"layers +\d+ +.*\d ACTIVATION.*",
    ):
        assert re.search(rf"^{row}$", out, re.M), (row, out)
    assert main(["inspect", "net.engine", "--layers"]) == 0
    assert re.search(r"^  ACTIVATION +relu", capsys.readouterr().out, re.M)


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "there is no file net.engine"),
        (b"hello", 1, "net.engine is no engine but a text"),
        (b"vtrt" + bytes(12) + (28).to_bytes(8, "little") + bytes(4), 1, "net.engine is a plain engine, or no engine"),
    ],
)
def test_inspect_names_what_it_cannot_read(tmp_path, monkeypatch, content, code, message, capsys):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "net.engine").write_bytes(content)
    assert main(["inspect", "net.engine"]) == code
    assert capsys.readouterr().err.startswith(f"torch2rt: {message}")


def test_an_engine_saved_without_facts_is_inspected(models, tmp_path, capsys):
    made = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)])
    made.built = dataclasses.replace(made.built, facts={})
    made.save_engine(tmp_path / "older.engine")
    assert main(["inspect", str(tmp_path / "older.engine")]) == 0
    assert re.search(r"^output_0 +output\nreport.*(\n.*)*\nlayers +unknown$", capsys.readouterr().out, re.M)


# The command itself --------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """
import sys
from torch2rt.cli.main import main
try:
    code = main(sys.argv[1:])
except SystemExit as error:
    code = error.code
assert "torch" not in sys.modules and "numpy" not in sys.modules
sys.exit(code)
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["convert", "--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["convert", "a:b"], 2),
        (["convert", "a:b", "--input", "2x"], 2),
        (["convert", "a:b", "--input", "2", "-o", "no/folder/x"], 2),
        (["convert", "a:b", "--input", "2", "--weights", "no.file"], 2),
        (["inspect", "no.file"], 2),
        (["convert", "a:b", "--input", "2", "--max", "2", "--max", "3"], 2),
    ],
)
def test_help_and_mistakes_need_no_torch(arguments, code):
    command = [sys.executable, "-c", WITHOUT_TORCH, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stderr


def test_python_runs_the_package():
    done = subprocess.run([sys.executable, "-m", "torch2rt", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, f"torch2rt {package.__version__}\n")


def test_a_reader_may_have_read_enough():
    command = [sys.executable, "-m", "torch2rt", "ops"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() in (0, 1)


def test_the_package_lists_its_names():
    assert set(package.__all__) <= set(dir(package)) and "TRTModule" in package.__all__


def test_torchvision_models_have_random_weights(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("weights are downloaded"))
    assert isinstance(load_model("torchvision:squeezenet1_1"), torch.nn.Module)
    assert isinstance(load_model("torchvision:lraspp_mobilenet_v3_large"), torch.nn.Module)


def test_ops_lists_converters_by_family(capsys):
    assert main(["ops"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^activation\n(    .*\n)*    .*torch.nn.functional.leaky_relu", out, re.M)
    assert re.search(r"\d+ callables", out)
    assert main(["ops", "leaky"]) == 0
    family, first, *_ = capsys.readouterr().out.splitlines()
    assert family == "activation" and "torch.nn.functional.leaky_relu" in first
    assert main(["ops", "normalize"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"Python makes for them \(\d+\)\n(    .*\n)*    torch.nn.functional.normalize", out)
    assert main(["ops", "no such call"]) == 1


def test_doctor_says_what_is_there(capsys):
    code = main(["doctor"])
    out = capsys.readouterr().out
    assert re.search(r"^chosen +tensorrt(_rtx)? \d+\.\d+", out, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}", out, re.M)
    if torch.cuda.is_available():
        assert re.search(r"^GPU 0 .*compute capability \d+\.\d+", out, re.M)
    else:
        assert code == 1
        assert re.search(r"^builds +yes", out, re.M)
        assert "-> There is no NVIDIA driver" in out or "-> torch" in out


def test_doctor_without_cuda_in_torch(monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "built without CUDA" in out and "install a CUDA build of torch" in out


WITHOUT_TENSORRT = """
import sys

class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tensorrt", "tensorrt_rtx"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.startswith("tensorrt") else found(name, *a)
sys.meta_path.insert(0, Nothing())
from torch2rt.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    "arguments", [["doctor"], ["ops"], ["convert", "torch.nn:ReLU", "--input", "2x3"]], ids=["doctor", "ops", "convert"]
)
def test_without_tensorrt(arguments):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORRT, *arguments], check=False, capture_output=True, text=True
    )
    text = done.stdout + done.stderr
    assert done.returncode == 1, text
    assert "pip install 'torch2rt[rtx]'" in text
    assert "Traceback" not in text


def test_a_wrong_choice_of_tensorrt(tmp_path):
    environment = {**os.environ, "TORCH2RT_TENSORRT": "tensorflow"}
    command = [sys.executable, "-m", "torch2rt.cli.main", "doctor"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TORCH2RT_TENSORRT='tensorflow' is not one of tensorrt, tensorrt_rtx" in done.stdout


def test_fallback(models, capsys, tmp_path):
    path, model = tmp_path / "halves.t2rt", ["convert", f"{models}:Halves", "--input", "5x3x4"]
    assert main(model) == 1
    assert "With fallback=True: 1 TensorRT segment" in capsys.readouterr().err
    assert main([*model, "--fallback", "--min-segment-calls", "1", "-o", str(path)]) == 0
    out = capsys.readouterr().out
    assert "2 TensorRT and 1 torch segments" in out and out.count("float32[5, 3, 4]") == 1
    assert re.search(r"segment +1: torch, 1 call: torch.linalg.svdvals", out)
    loaded = load(path)
    assert [type(segment).__name__ for segment in loaded.segments] == ["TRTModule", "TorchSegment", "TRTModule"]
    assert loaded.input_names == ["x"]
    assert main([*model, "--fallback", "--torch-executed", "last", "--torch-segments", "eager"]) == 0
    assert re.search(r"segment +\d: torch.*of (first to )?last.*torch_executed names it", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--torch-executed", "last"], 2, "--torch-executed needs --fallback or --plan"),
        (["--min-segment-calls", "2"], 2, "--min-segment-calls needs --fallback or --plan"),
        (["--torch-segments", "compile", "--plan"], 2, "--torch-segments needs --fallback"),
        (["--measure-segments"], 2, "--measure-segments needs --fallback"),
        (["--fallback", "--max-sizes", "0"], 2, "max_sizes"),
        (["--fallback", "--torch-executed", "middle"], 2, "torch_executed names middle"),
    ],
)
def test_options_of_fallback_that_do_not_fit(models, capsys, options, code, message):
    assert main(["convert", f"{models}:Halves", "--input", "5x3x4", *options]) == code
    assert message in capsys.readouterr().err


def test_a_plan_takes_what_fallback_takes(models, capsys, tmp_path):
    page = tmp_path / "plan.html"
    given = ["--plan", "--torch-executed", "last", "--min-segment-calls", "2", "-o", str(page)]
    assert main(["convert", f"{models}:Halves", "--input", "5x3x4", *given]) == 0
    assert "torch_executed names it" in capsys.readouterr().out
    assert "last: 0 of 1 calls" in page.read_text()


def test_precision(capsys):
    model = ["convert", "torchvision:squeezenet1_1", "--input", "1x3x32x32", "--precision", "fp16"]
    assert main([*model, "--keep-fp32", "classifier", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "classifier.1  " in plan and "(keep_fp32: 'classifier')" in plan and "build" not in plan
    assert main([*model, "--compare"]) == 0
    out = capsys.readouterr().out
    assert "the reference beside the module" in out and "float16" in out
    assert main([*model, "--plan", "--compare"]) == 2


def test_quantisation(models, capsys, tmp_path):
    model = ["convert", f"{models}:Net", "--input", "2x4", "--max-batch-size", "2", "--no-verify"]
    (list_of, one), cache = (tmp_path / "list.pt", tmp_path / "one.npy"), tmp_path / "table.json"
    rows = torch.rand(6, 4)
    torch.save([[rows[:4]], rows[4:], {"x": rows}], list_of)
    np.save(one, rows.numpy())
    int8 = [*model, "--precision", "int8+fp32", "--calibration-method", "minmax", "--quantize-all"]
    for path in (list_of, one):
        given = ["--calibration", str(path), "--calibration-cache", str(cache), "--plan"]
        assert main([*int8, *given]) == 0
        assert re.search(r"linear +1 int8", capsys.readouterr().out)
        assert json.loads(cache.read_text())["largest"] == {"x": rows.max()}
        cache.unlink()
        assert main([*int8, *given, "--keep-float", "linear"]) == 0
        assert "(not quantised: keep_float: 'linear')" in capsys.readouterr().out
    smooth = ["--calibration", str(one), "--smooth-quant", "0.5", "--bias-correction"]
    assert main([*model, "--precision", "fp8", *smooth]) == 0
    picture = tmp_path / "auto.png"
    auto = ["--precision", "auto", "--tolerance", "1e-9", "--samples", str(one), "--plan", "--picture", str(picture)]
    capsys.readouterr()
    assert main([*model, *auto]) == 0
    assert re.search(r"kept +metric\n(.*\n)+.* taken", capsys.readouterr().out) and picture.stat().st_size > 1000
    wrong = tmp_path / "wrong.pt"
    for value, message in (({"z": rows}, "no parameter"), ([3], "holds a int"), ([[rows, 2]], "holds a list")):
        torch.save(value, wrong)
        assert main([*int8, "--calibration", str(wrong)]) == 1
        assert message in capsys.readouterr().err
    wrong.write_text("no file")
    assert main([*int8, "--calibration", str(wrong)]) == 1
    assert main([*int8, "--calibration", "nowhere.pt"]) == 2 == main([*int8]) == main([*model, "--picture", "a.png"])
    assert main([*model, "--precision", "int9"]) == 2
