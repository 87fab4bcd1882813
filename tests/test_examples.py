import importlib.util
from pathlib import Path

ROOT = Path(__file__).parent.parent


def load(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_digits(capsys):
    results = load("examples/digits.py").main()
    assert results["eager accuracy"] > 0.95
    assert abs(results["engine accuracy"] - results["eager accuracy"]) < 0.005
    assert results["disagreements"] <= 1  # a digit on the fence, where kernels round differently
    assert results["reloaded disagreements"] <= 1
    assert "held-out digits" in capsys.readouterr().out


def test_conversion_benchmark():
    conversion = load("benchmarks/conversion.py")
    ours = conversion.measure("squeezenet1_1", "torch2rt", True)
    assert set(ours["seconds"]) == set(ours["peak"]) == {"trace", "lower", "build"}
    assert ours["engine"] > ours["weights"] > 0
    seconds = {"export": 3 * ours["seconds"]["trace"] + 3 * ours["seconds"]["lower"], "parse": 0.1, "build": 1.0}
    theirs = {**ours, "seconds": seconds, "peak": {s: 2 * max(ours["peak"].values()) for s in seconds}}
    failed = {"error": "RuntimeError: no", "seconds": {"export": 1.0}, "peak": {}}
    results = {"good": {"torch2rt": ours, "onnx": theirs}, "bad": {"torch2rt": failed, "onnx": failed}}
    text = conversion.table(results)
    assert "failed: RuntimeError: no" in text and "good" in text
    assert [met for met, _ in conversion.aims(results)] == [True, True, True, False]
