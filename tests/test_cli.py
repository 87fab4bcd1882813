import os
import re
import subprocess
import sys

import pytest
import torch
from test_verification import times, wrong

from torch2rt import TRTModule, cli
from torch2rt.cli import main

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


class Unknown(torch.nn.Module):
    def forward(self, x):
        return torch.linalg.svdvals(x)


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


def test_the_users_own_errors_keep_their_traceback(models):
    with pytest.raises(KeyError, match="user's own"):
        main(["convert", f"{models}:broken", "--input", "2x4"])


def test_torchvision_models_have_random_weights(monkeypatch):
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", lambda *a, **k: pytest.fail("weights are downloaded"))
    assert isinstance(cli.load_model("torchvision:squeezenet1_1"), torch.nn.Module)
    assert isinstance(cli.load_model("torchvision:lraspp_mobilenet_v3_large"), torch.nn.Module)


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
from torch2rt.cli import main
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
    command = [sys.executable, "-m", "torch2rt.cli", "doctor"]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert "TORCH2RT_TENSORRT='tensorflow' is not one of tensorrt, tensorrt_rtx" in done.stdout
