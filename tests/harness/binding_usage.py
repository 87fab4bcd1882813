"""What Python source asks of TensorRT's bindings, checked without running it.

`check_usage` follows the values that come from `trt` through the source of torch2rt: names (`EW =
trt.ElementWiseOperation`), calls (`layer = ctx.network.add_slice(...)`), attributes (`layer.axes = ...`), imports among
torch2rt's own modules. A value whose origin it cannot see it leaves alone. Code behind a question that the bindings
answer with no, such as `if has_attention():` or `hasattr(trt.ISliceLayer, "axes")`, is not looked at.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from harness.bindings import Table

# TensorRT's objects by the names that torch2rt gives them, where a value comes from out of sight.
PARAMETERS = {
    "network": "INetworkDefinition",
    "definition": "INetworkDefinition",
    "builder": "Builder",
    "config": "IBuilderConfig",
    "engine": "ICudaEngine",
}
ATTRIBUTES = {**PARAMETERS, "context": "IExecutionContext", "runtime": "Runtime"}
# Functions whose callers have asked first.
ONLY_IF = {"set_compute_capabilities": "builds_without_gpu()", "add_attention": "has_attention()"}


@dataclasses.dataclass(frozen=True)
class Value:
    """The package itself (path ""), a class, a method, or (`instance`) an object of the class at `path`."""

    path: str
    instance: bool = False


Names = dict[str, Value | None]


class Source:
    """The files that are checked, as parsed modules."""

    def __init__(self, files: dict[str, Path]) -> None:
        self.files = files
        self.trees = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in files.items()}

    @classmethod
    def of(cls, packages: dict[str, Path], exempt: Sequence[str] = ()) -> Source:
        files = {
            ".".join((p, *f.relative_to(folder).with_suffix("").parts)).removesuffix(".__init__"): f
            for p, folder in packages.items()
            for f in sorted(folder.rglob("*.py"))
        }
        return cls({name: path for name, path in files.items() if name not in exempt})


@dataclasses.dataclass
class Report:
    """`used`: every name that was looked up; `problems`: `file:line: what` for those that are not there."""

    used: set[str] = dataclasses.field(default_factory=set)
    problems: list[str] = dataclasses.field(default_factory=list)


def check_usage(source: Source, table: Table, is_rtx: bool) -> Report:
    """Hold a source against one TensorRT's bindings."""
    report = Report()
    checker: dict[Any, Any] = {}
    for module in source.trees:
        _module(source, module, table, is_rtx, report, checker)
    report.problems.sort()
    return report


def _module(source: Source, name: str, table: Table, is_rtx: bool, report: Report, done: dict[str, Names]) -> Names:
    if name not in done:
        done[name] = {}
        visitor = _Visitor(source, name, table, is_rtx, report, done)
        visitor.names = done[name]
        visitor.body(source.trees[name].body)
        visitor.later()
    return done[name]


class _Visitor(ast.NodeVisitor):
    def __init__(
        self, source: Source, module: str, table: Table, is_rtx: bool, report: Report, done: dict[str, Names]
    ) -> None:
        self.source, self.module, self.table, self.is_rtx, self.report, self.done = (
            source,
            module,
            table,
            is_rtx,
            report,
            done,
        )
        self.names: Names = {}
        self.functions: list[tuple[Any, Names]] = []

    def problem(self, node: ast.AST, what: str) -> None:
        self.report.problems.append(f"{self.source.files[self.module].name}:{node.lineno}: {what}")  # type: ignore[attr-defined]

    def later(self) -> None:
        """Look into functions once the names around them are all known."""
        for function, names in self.functions:
            inner = _Visitor(self.source, self.module, self.table, self.is_rtx, self.report, self.done)
            inner.names = dict(names)
            arguments = function.args
            for argument in [
                *arguments.posonlyargs,
                *arguments.args,
                *arguments.kwonlyargs,
                arguments.vararg,
                arguments.kwarg,
            ]:
                if argument is not None:
                    ours = argument.annotation is not None and ast.unparse(argument.annotation) not in ("Any", "object")
                    path = None if ours else PARAMETERS.get(argument.arg)
                    inner.names[argument.arg] = Value(path, True) if path else None
            if isinstance(function, ast.Lambda):
                inner.visit(function.body)
            else:
                inner.body(function.body)
            inner.later()

    # Statements ------------------------------------------------------------------------------------------------------

    def body(self, statements: Sequence[ast.stmt]) -> bool:
        """Visit statements up to the first that ends the block; whether there is one."""
        for statement in statements:
            if isinstance(statement, ast.If):
                if self.branch(statement):
                    return True
                continue
            self.visit(statement)
            if isinstance(statement, (ast.Return, ast.Raise, ast.Continue, ast.Break)) or self.refuses(statement):
                return True
        return False

    def refuses(self, statement: ast.stmt) -> bool:
        """Whether a statement is the vocabulary's `refuse(...)`, or a `check(...)` that does not hold."""
        match statement:
            case ast.Expr(ast.Call(ast.Name("refuse"))):
                return True
            case ast.Expr(ast.Call(ast.Name("check"), [condition, *_])):
                return self.truth(condition) is False
        return False

    def branch(self, node: ast.If) -> bool:
        self.visit(node.test)
        truth = self.truth(node.test)
        ends = [
            self.body(block) for block, taken in ((node.body, True), (node.orelse, False)) if truth is not (not taken)
        ]
        return all(ends)

    def generic_visit(self, node: ast.AST) -> None:
        for _, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                self.body(value)
            elif isinstance(value, ast.AST):
                self.visit(value)
            elif isinstance(value, list):
                for item in value:
                    if isinstance(item, ast.AST):
                        self.visit(item)

    def _function(self, node: Any) -> None:
        for part in (*getattr(node, "decorator_list", ()), *node.args.defaults, *filter(None, node.args.kw_defaults)):
            self.visit(part)
        name = getattr(node, "name", None)
        if name in ONLY_IF and self.truth(ast.parse(ONLY_IF[name], mode="eval").body) is False:
            return
        self.functions.append((node, self.names))

    visit_FunctionDef = visit_AsyncFunctionDef = visit_Lambda = _function

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for part in (*node.decorator_list, *node.bases):
            self.visit(part)
        self.body(node.body)

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            if node.module in self.source.trees:
                names = _module(self.source, node.module, self.table, self.is_rtx, self.report, self.done)
                self.names[alias.asname or alias.name] = names.get(alias.name)

    def visit_Assign(self, node: ast.Assign) -> None:
        value = self.infer(node.value)
        for target in node.targets:
            self.assign(target, node.value, value)

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.names[node.target.id] = self.infer(node.value)

    def assign(self, target: ast.expr, node: ast.expr, value: Value | None) -> None:
        if isinstance(target, ast.Name):
            self.names[target.id] = Value("") if target.id == "trt" else value
        elif isinstance(target, (ast.Tuple, ast.List)):
            parts = (
                node.elts if isinstance(node, (ast.Tuple, ast.List)) and len(node.elts) == len(target.elts) else None
            )
            for i, part in enumerate(target.elts):
                self.assign(part, parts[i] if parts else node, self.peek(parts[i]) if parts else None)
        else:
            self.visit(target)

    def visit_For(self, node: ast.For) -> None:
        self.visit(node.iter)
        self.assign(node.target, node.iter, None)
        self.body([*node.body, *node.orelse])

    # Expressions -----------------------------------------------------------------------------------------------------

    def peek(self, node: ast.expr) -> Value | None:
        """`infer` without reporting what it meets."""
        report, self.report = self.report, Report()
        try:
            return self.infer(node)
        finally:
            self.report = report

    def infer(self, node: ast.expr) -> Value | None:
        """Look into an expression and say what its value is, if it is one of TensorRT's."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return self.attribute(node)
        if isinstance(node, ast.Call):
            return self.call(node)
        if isinstance(node, ast.IfExp):
            self.visit(node.test)
            truth = self.truth(node.test)
            values = [
                self.infer(part)
                for part, taken in ((node.body, True), (node.orelse, False))
                if truth is not (not taken)
            ]
            return values[0] if all(v == values[0] for v in values) else None
        if isinstance(node, ast.BoolOp):
            return self.either(node)
        if isinstance(node, ast.NamedExpr):
            self.visit(node)
            return self.names[node.target.id]
        self.generic_visit(node)
        return None

    def visit_expression(self, node: ast.expr) -> None:
        self.infer(node)

    visit_Attribute = visit_Call = visit_IfExp = visit_BoolOp = visit_expression

    def either(self, node: ast.BoolOp) -> Value | None:
        value = None
        for part in node.values:
            value = self.infer(part)
            if self.truth(part) is isinstance(node.op, ast.Or):
                break
        return value

    def attribute(self, node: ast.Attribute) -> Value | None:
        owner = self.infer(node.value)
        if owner is None:
            path = ATTRIBUTES.get(node.attr)
            return Value(path, True) if path and not isinstance(node.value, ast.Call) else None
        return self.member(node, owner, node.attr, isinstance(node.ctx, ast.Store))

    def member(self, node: ast.AST, owner: Value, name: str, stored: bool = False) -> Value | None:
        path = f"{owner.path}.{name}".removeprefix(".")
        entry = self.table.get(path)
        if entry is None and name.startswith("__"):
            return None
        self.report.used.add(path)
        if entry is None:
            self.problem(node, f"there is no {path}")
            return None
        if stored and entry.get("settable") is False:
            self.problem(node, f"{path} cannot be set")
        if entry.get("class") or "overloads" in entry:
            return Value(path)
        return Value(entry["type"], True) if entry["type"] else None

    def call(self, node: ast.Call) -> Value | None:
        function = self.infer(node.func)
        for part in (*node.args, *(k.value for k in node.keywords)):
            self.visit(part)
        if isinstance(node.func, ast.Name) and node.func.id == "getattr" and len(node.args) > 1:
            owner, asked = self.peek(node.args[0]), node.args[1]
            if owner is not None and isinstance(asked, ast.Constant) and self.has(owner, str(asked.value)):
                return self.member(node, owner, str(asked.value))
        if function is None or function.instance or not function.path:
            return None
        entry = self.table[function.path]
        overloads = entry.get("overloads")
        if overloads and not any(_fits(node, *overload) for overload in overloads):
            self.problem(node, f"{function.path} does not take {ast.unparse(node)}")
        return Value(entry["type"], True) if entry["type"] else None

    # Questions to the bindings ---------------------------------------------------------------------------------------

    def has(self, owner: Value, name: str) -> bool:
        return f"{owner.path}.{name}".removeprefix(".") in self.table

    def truth(self, node: ast.expr) -> bool | None:
        """What a condition comes to with these bindings, or `None` where that is not for them to say."""
        if isinstance(node, ast.Name) and node.id == "IS_RTX":
            return self.is_rtx
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            truth = self.truth(node.operand)
            return None if truth is None else not truth
        if isinstance(node, ast.BoolOp):
            truths, decisive = [self.truth(v) for v in node.values], isinstance(node.op, ast.Or)
            return decisive if decisive in truths else None if None in truths else not decisive
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            return self._asked(node, node.func.id)
        return None

    def _asked(self, node: ast.Call, function: str) -> bool | None:
        if function in ("hasattr", "getattr") and isinstance(asked := node.args[1], ast.Constant):
            owner = self.peek(node.args[0])
            return None if owner is None else self.has(owner, str(asked.value))
        for name, tree in self.source.trees.items():
            if name.endswith((".backend", ".backend.tensorrt", ".backend.quirks")) and not node.args:
                for found in _functions(tree):
                    if (
                        found.name == function
                        and isinstance(last := found.body[-1], ast.Return)
                        and last.value is not None
                    ):
                        seam = _Visitor(self.source, name, self.table, self.is_rtx, Report(), self.done)
                        seam.names = _module(self.source, name, self.table, self.is_rtx, self.report, self.done)
                        return seam.truth(last.value)
        return None


def _functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    return (node for node in tree.body if isinstance(node, ast.FunctionDef))


def _fits(call: ast.Call, names: list[str], required: int) -> bool:
    """Whether a call's arguments are ones that an overload takes, as far as their number and names go."""
    keywords = [k.arg for k in call.keywords]
    if any(k is not None and k not in names for k in keywords):
        return False
    if None in keywords or any(isinstance(a, ast.Starred) for a in call.args):
        return True
    return required <= len(call.args) + len(keywords) <= len(names)
