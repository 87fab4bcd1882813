"""Who imports whom: the rooms of torch2rt in their order, and what converters may know of them.

The imports are read from the source, those under `TYPE_CHECKING` and within functions included.
"""

import ast
import functools
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# A room imports only from rooms further down. Rooms on one line do not import each other.
ORDER = [
    ["__main__"],
    ["cli"],
    ["bench"],
    ["compile_backend", "planning", "saving", "submodules"],
    ["precision_plan"],
    ["convert"],
    ["background"],
    ["conversion"],
    ["debug"],
    ["lowering"],
    ["lowering_errors"],
    ["runtime"],
    ["engine"],
    ["vocabulary"],
    ["tracing"],
    ["passes"],
    ["network"],
    ["recipes"],
    ["reference"],
    ["graph_key"],
    ["graph"],
    ["input_ranges"],
    ["interface"],
    ["objects", "promises"],
    ["registry", "structure"],
    ["callables", "python_calls"],
    ["migration"],
    ["arguments"],
    ["backend"],
    ["size_choices"],
    ["sizes", "errors", "interrupts", "progress", "usage"],
]
FLOOR = {room: floor for floor, rooms in enumerate(ORDER) for room in rooms}


@functools.cache
def modules() -> dict[str, Path]:
    files = {
        ".".join(("torch2rt", *f.relative_to(ROOT / "torch2rt").with_suffix("").parts)): f
        for f in (ROOT / "torch2rt").rglob("*.py")
    }
    files |= {f"torch2rt.converters.{f.stem}": f for f in (ROOT / "converters").glob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in files.items()}


def imports(tree: ast.AST) -> Iterator[str]:
    """The modules of torch2rt that some source imports, or takes names from."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "torch2rt")
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "the rooms are imported by their full names"
            if node.module and node.module.split(".")[0] == "torch2rt":
                yield from (origin(node.module, alias.name) for alias in node.names)


def origin(module: str, name: str) -> str:
    """The module that `from module import name` takes a name from: for torch2rt's public names, that of the name."""
    if f"{module}.{name}" in modules():
        return f"{module}.{name}"
    return public().get(name, module) if module == "torch2rt" else module


@functools.cache
def public() -> dict[str, str]:
    tree = ast.parse(modules()["torch2rt"].read_text(encoding="utf-8"))
    found = (node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module)
    return {alias.name: node.module for node in found for alias in node.names}


@functools.cache
def imported() -> dict[str, set[str]]:
    """The modules that each module imports, less the one import that lies in the nature of a registry."""
    trees = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in modules().items()}
    found = {name: set(imports(tree)) for name, tree in trees.items() if name != "torch2rt"}
    (load,) = (n for n in trees["torch2rt.registry"].body if isinstance(n, ast.FunctionDef) and n.name == "load")
    assert set(imports(load)) == {f"torch2rt.converters{name}" for name in ("", ".vision", ".decomposed", ".modelopt")}
    found["torch2rt.registry"] -= set(imports(load))
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def is_own(module: str) -> bool:
    return room(module) != "converters"


def test_every_module_has_a_room():
    assert {room(name) for name in imported() if is_own(name)} <= FLOOR.keys()


def test_no_room_imports_upwards():
    upwards = {
        (name, other)
        for name, others in imported().items()
        if is_own(name)
        for other in others
        if other != "torch2rt" and room(name) != room(other) and not FLOOR[room(name)] < FLOOR.get(room(other), -1)
    }
    assert not upwards


def test_no_circle_of_imports():
    assert [name for name in imported() if name in reached_from(name)] == []


def reached_from(start: str) -> set[str]:
    """The modules that importing a module imports, one after the other."""
    seen: set[str] = set()
    left = [start]
    while left:
        others = imported().get(left.pop(), set()) - seen
        seen |= others
        left += others
    return seen


@pytest.mark.parametrize("name", [name for name in imported() if not is_own(name) and name != "torch2rt.converters"])
def test_converters_know_only_the_vocabulary(name):
    """Its package, the module of it for complex numbers, and other families."""
    known = {"torch2rt.vocabulary", "torch2rt.vocabulary.complex"}
    assert {other for other in imported()[name] if is_own(other)} <= known


def _calls(function: ast.FunctionDef) -> set[str]:
    calls = (node.func for node in ast.walk(function) if isinstance(node, ast.Call))
    return {function.id for function in calls if isinstance(function, ast.Name)}


@pytest.mark.parametrize("name", [name for name in imported() if not is_own(name)])
def test_converters_that_refuse_say_what(name):
    """`limits` is what `torch2rt ops` and docs/operators.md show."""
    silent = []
    for function in ast.parse(modules()[name].read_text(encoding="utf-8")).body:
        for call in getattr(function, "decorator_list", ()):
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") in ("converter", "complex_converter"):
                if _calls(function) & {"check", "refuse", "require"} and "limits" not in [k.arg for k in call.keywords]:
                    silent.append(function.name)
    assert not silent


def test_the_vocabulary_exports_and_holds_no_code():
    tree = ast.parse(modules()["torch2rt.vocabulary"].read_text(encoding="utf-8"))
    docstring, *rest = tree.body
    assert isinstance(docstring, ast.Expr) and all(
        isinstance(node, (ast.Import, ast.ImportFrom)) or ast.unparse(node).startswith("__all__ = ") for node in rest
    )
