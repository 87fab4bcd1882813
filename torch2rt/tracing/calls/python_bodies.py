"""torch functions written in Python, whose bodies are traced."""

from __future__ import annotations

import functools
import types

from torch2rt.callables import Target


@functools.cache
def python_body(func: Target) -> Target | None:
    """A Python-level torch function with its first line's dispatch to the tracer taken out, so that its body is traced.

    It is the same code over a copy of its module's globals in which `has_torch_function` says no.
    """
    checks = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    if not isinstance(func, types.FunctionType) or not set(checks) & set(func.__code__.co_names):
        return None
    no = dict.fromkeys(checks, lambda *args: False)
    body = types.FunctionType(
        func.__code__, {**func.__globals__, **no}, func.__name__, func.__defaults__, func.__closure__
    )
    body.__kwdefaults__ = func.__kwdefaults__
    return body
