"""Every name that torch2rt asks of `trt` exists in every TensorRT it supports, or is asked for behind `hasattr`."""

import functools
import os
from pathlib import Path

import pytest
from harness.binding_usage import Source, check_usage
from harness.bindings import Unavailable, describe

import torch2rt

ROOT = Path(torch2rt.__file__).parent
CONVERTERS = Path(__file__).parents[2] / "converters"
VERSIONS = [
    ("tensorrt_cu12_bindings", "10.3.0"),
    ("tensorrt_cu12_bindings", "10.16.1.11"),
    ("tensorrt_cu12_bindings", "11.4.0.106"),
    ("tensorrt_rtx_cu13_bindings", "1.4.0.76"),
    ("tensorrt_rtx_cu13_bindings", "1.6.1.120"),
    ("tensorrt_rtx_cu13_bindings", "1.7.1.116"),
]
# The reference evaluator reads a network back by name, and only the layers that are there; so does the package of their
# meanings, which is not looked into.
EXEMPT = ("torch2rt.reference.evaluator",)


@functools.cache
def read_source():
    return Source.of({"torch2rt": ROOT, "torch2rt.converters": CONVERTERS}, EXEMPT)


@pytest.mark.parametrize(("package", "version"), VERSIONS, ids=[f"{p.split('_cu')[0]}-{v}" for p, v in VERSIONS])
def test_every_name_exists(package, version):
    try:
        table = describe(package, version)
    except Unavailable as error:
        if os.environ.get("CI") and not error.expected:
            raise
        pytest.skip(str(error))
    source = read_source()
    report = check_usage(source, table, is_rtx="rtx" in package)
    assert not report.problems, "\n".join(report.problems)
    assert {
        "ActivationType.RELU",
        "INetworkDefinition.add_slice",
        "ISliceLayer.mode",
        "Builder.create_network",
    } <= report.used


TABLE = {
    "Kind": {"type": "Kind", "class": True},
    "Kind.RELU": {"type": "Kind"},
    "Layer": {"type": "Layer", "class": True},
    "Layer.alpha": {"type": None, "settable": True},
    "Layer.name": {"type": None, "settable": False},
    "INetworkDefinition": {"type": "INetworkDefinition", "class": True},
    "INetworkDefinition.add": {"type": "Layer", "overloads": [(["input", "kind", "extra"], 2)]},
}
ADD = "INetworkDefinition.add"
BACKEND = "trt = _import()\ndef has_more():\n    return hasattr(trt.INetworkDefinition, 'add_more')\n"


@pytest.mark.parametrize(
    ("code", "problems"),
    [
        ("Kind = trt.Kind\ndef f(): return Kind.RELU", []),
        ("Kind = trt.Kind\ndef f(): return Kind.GELU", ["there is no Kind.GELU"]),
        ("A, B = trt.Kind, trt.Layer\nA.ELU", ["there is no Kind.ELU"]),
        ("def f(ctx):\n  x = ctx.network.add(1, 2)\n  x.alpha = 1\n  x.beta = 2", ["there is no Layer.beta"]),
        ("def f(ctx):\n  ctx.network.add(1, 2).name = 'x'", ["Layer.name cannot be set"]),
        ("def f(network):\n  network.add(1)", [f"{ADD} does not take network.add(1)"]),
        ("def f(network):\n  network.add(1, 2, other=3)", [f"{ADD} does not take network.add(1, 2, other=3)"]),
        ("def f(network, xs):\n  network.add(*xs)\n  network.add(1, kind=2)", []),
        ("def f(ctx):\n  ctx.network.add_more(1)", [f"there is no {ADD}_more"]),
        ("def f(ctx):\n  if has_more():\n    ctx.network.add_more(1)", []),
        ("def f(ctx):\n  if not has_more():\n    return 1\n  ctx.network.add_more(1)", []),
        ("def f(ctx):\n  check(has_more(), 'too old')\n  ctx.network.add_more(1)", []),
        ("def f(ctx, x):\n  if x and has_more():\n    ctx.network.add_more(1)", []),
        ("def f(ctx, x):\n  return ctx.network.add_more(1) if has_more() and x else 0", []),
        ("def f(network):\n  x = getattr(network, 'more', None) or network.add\n  x(1)", [f"{ADD} does not take x(1)"]),
        ("def f():\n  if hasattr(trt.Kind, 'A'):\n    return trt.Kind.A\n  trt.Kind.B", ["there is no Kind.B"]),
    ],
)
def test_usage_is_seen(code, problems, tmp_path):
    files = {"p.backend": tmp_path / "backend.py", "p.code": tmp_path / "code.py"}
    files["p.backend"].write_text(BACKEND)
    files["p.code"].write_text("from p.backend import has_more, trt\n" + code)
    report = check_usage(Source(files), TABLE, is_rtx=False)
    assert [p.split(": ", 1)[1] for p in report.problems] == problems
