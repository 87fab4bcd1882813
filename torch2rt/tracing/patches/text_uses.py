"""What a module's code does with a text that it makes of a size, read off the code around the place.

A text is a plain string, of which nobody is told what becomes of it. So the code says it: a text in an error or in a
message for the log decides nothing, and any other may be compared, or be the key of a table.
"""

from __future__ import annotations

import ast
import functools
import itertools
import linecache
import re
import sys
from types import FrameType

Position = tuple[int, int, int, int]  # first line, last line, first column, column behind the last


_TELL = ("logging", "warnings", "traceback", "torch", "torch2rt")  # packages whose texts are messages
_TELLS = frozenset(  # functions by their names, whatever they are methods of
    """
        print log debug info warning warn warning_once warn_once error exception critical deprecate fail skip
    """.split()
)
_CHECKS = re.compile("assert|check|require|expect|ensure|verify|valid", re.IGNORECASE)  # a condition, then a message
_NUMBERS = frozenset({"math", "cmath", "torch", "np", "numpy"})  # whose `log` is another
_TEXTS = frozenset({"str", "repr", "format", "join", "map", "tuple", "list"})
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)


def is_told(frame: FrameType | None) -> bool:
    """Whether the text that the code of a frame is making only goes into errors and messages."""
    if frame is None:
        return False
    if str(frame.f_globals.get("__name__")).split(".")[0] in _TELL:
        return True
    parents = _parents("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    texts = _texts_at(parents, frame.f_lineno, _position(frame))
    return bool(texts) and all(_only_tells(text, parents) for text in texts)


def _position(frame: FrameType) -> Position | None:
    """Where in its file the instruction is that a frame is at; `None` where Python does not say it (before 3.11)."""
    if sys.version_info < (3, 11):
        return None
    found = next(itertools.islice(frame.f_code.co_positions(), frame.f_lasti // 2, None), (None,) * 4)
    return None if None in found else found  # type: ignore[return-value]


@functools.lru_cache(maxsize=32)
def _parents(source: str) -> dict[ast.AST, ast.AST]:
    """The syntax of a file, as what each part is a part of."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return {}
    return {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}


def _texts_at(parents: dict[ast.AST, ast.AST], line: int, position: Position | None) -> list[ast.AST]:
    """The part of a file that makes the text: the smallest that holds a position, or all that a line may mean."""
    on_line = [node for node in parents if node.__dict__.get("lineno", line + 1) <= line <= node.end_lineno]  # type: ignore[attr-defined]
    if position is None:
        texts: list[ast.AST] = [node for node in on_line if isinstance(node, ast.JoinedStr)]
        return texts or [node for node in on_line if isinstance(node, ast.Call)]
    first, last = position[0::2], position[1::2]
    holding = [
        node
        for node in on_line
        if (node.lineno, node.col_offset) <= first and last <= (node.end_lineno, node.end_col_offset)  # type: ignore[attr-defined]
    ]
    return holding[-1:]  # a part comes after what it is a part of


def _only_tells(text: ast.AST, parents: dict[ast.AST, ast.AST], names: int = 2) -> bool:
    """Whether a text only goes into errors and messages, at once or by way of a variable."""
    node: ast.AST | None = text
    part: ast.AST | None = None  # of the node, which holds the text
    while node is not None:
        parent = parents.get(node)
        if isinstance(node, ast.Raise) or isinstance(parent, ast.Assert) and parent.msg is node:
            return True
        if isinstance(node, ast.Call) and (_tells(node, part) or isinstance(parent, ast.Raise)):
            return True
        if isinstance(node, ast.Call) and node is not text and _name(node) not in _TEXTS:
            return False
        if isinstance(node, ast.Assign) and names and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            return _variable_only_tells(node, node.targets[0].id, parents, names - 1)
        if isinstance(node, (ast.Compare, ast.Subscript, ast.stmt)):
            return False
        node, part = parent, node
    return False


def _variable_only_tells(assignment: ast.AST, name: str, parents: dict[ast.AST, ast.AST], names: int) -> bool:
    """Whether all uses of a variable of a function are."""
    function: ast.AST | None = assignment
    while function is not None and not isinstance(function, _FUNCTIONS):
        function = parents.get(function)
    if function is None:
        return False
    reads = [n for n in ast.walk(function) if isinstance(n, ast.Name) and n.id == name]
    return all(_only_tells(read, parents, names) for read in reads if isinstance(read.ctx, ast.Load))


def _name(call: ast.Call) -> str:
    return getattr(call.func, "attr", getattr(call.func, "id", ""))


def _tells(call: ast.Call, part: ast.AST | None) -> bool:
    """Whether a function is one that is given messages, in this part of its call."""
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if _name(call) in _TELLS:
        return not (_name(call) == "log" and owner in _NUMBERS)
    return bool(_CHECKS.search(_name(call))) and part is not None and part not in call.args[:1]
