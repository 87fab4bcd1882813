"""Every converter has a row that reaches it, and takes its arguments as torch does."""

import inspect
import types
from pathlib import Path

import pytest
import torch
from harness import Call, compare, eager, prepared, reached
from harness import plain_functions as coverage
from harness.reached import REGISTRY, SERVED, label, place

from torch2rt import lower, trace
from torch2rt.callables import qualified_name
from torch2rt.cli import ops as operators
from torch2rt.registry import ALIASES, Converter, renamed
from torch2rt.runtime.module import ReferenceModule

FAMILIES = sorted(
    {function.__module__.rpartition(".")[2] for function in SERVED} - {"decomposed", "modelopt"}
)  # test_recognize.py


def of_family(name):
    return [function for function in SERVED if function.__module__.endswith(f".{name}")]


def test_exceptions_are_of_converters():
    newest = {"resize torch._C._nn._upsample_lanczos2d_aa"}  # not every torch has it
    assert {*reached.ELSEWHERE, *reached.STATIC} - newest <= {label(function) for function in SERVED}


def test_a_converter_without_a_row_is_named():
    every = {(mode, place(function)) for function in SERVED for mode in ("static", "dynamic")}
    gone = next(function for function in SERVED if label(function) not in reached.ELSEWHERE)
    static = {place(function) for function in SERVED if label(function) in reached.STATIC}
    assert reached.missing(every) == []
    assert reached.missing({(mode, other) for mode, other in every if other != place(gone)}) == [label(gone)]
    assert reached.missing(every - {("dynamic", place(gone))}) == [f"{label(gone)}, for dynamic sizes"]
    assert reached.missing({(mode, other) for mode, other in every if mode == "static" or other not in static}) == []


WATCHED = ("integers torch.gcd", "activation torch.nn.functional.gelu")


def test_rows_are_watched(monkeypatch):
    monkeypatch.setattr(reached, "REACHED", set())
    with reached.watching("static"):
        lower(trace(Call(torch.gcd), [torch.tensor([6, 8]), torch.tensor([4, 3])]))
        lower(trace(Call(torch.nn.functional.gelu), [torch.randn(2, 3)]))
    assert {("static", place(f)) for f in SERVED if label(f) in WATCHED} <= reached.REACHED


# Signatures ----------------------------------------------------------------------------------------------------------

OVERRIDES = torch.overrides.get_testing_overrides()
IGNORED = {"out", "names", "generator", "layout", "pin_memory", "memory_format"}  # values do not depend on them
# Arguments that one of the signatures of a name gives to the parameter that another one calls otherwise.
SHARED = {
    ("other", "dim"),
    ("unbiased", "dim"),
    ("value", "src"),
    ("end", "start"),
    ("idx", "index"),
    ("k", "index"),
    ("v", "value"),
    ("self", "A"),
    ("split_size_or_sections", "split_size"),
    ("self", "tensor"),
}
# Functions whose parameters are not to be told from torch's signatures, and why.
UNTOLD = {
    "native_batch_norm_legit": "one of its overloads has no statistics, and goes by name",
    "where_method": "the schema is that of torch.where(condition, input, other)",
    "einsum_of_two": "torch.einsum takes *args",
    "einsum": "torch.einsum takes *args",
    "tensordot": "torch.functional.tensordot calls the operator by position",
    "tensor": "the schemas of torch.tensor are of numbers alone",
    "observed": "the documentation of fused_moving_avg_obs_fake_quant has its arguments in another order",
    "polygamma_method": "the schema is that of torch.polygamma(n, input)",
}
# Signatures that no call reaches a converter with, and why.
FOREIGN = {
    "aten::where": "where(condition) is nonzero",
    "aten::copy.Dict_Tensor": "it copies dicts",
    "aten::repeat_interleave.Tensor": "the size of repeat_interleave(repeats) depends on data",
    "aten::isin.Tensor_Scalar": "numbers are taken by position",
    "aten::isin.Scalar_Tensor": "numbers are taken by position",
    "aten::lstm.data": "of packed sequences, which are refused",
    "aten::gru.data": "of packed sequences, which are refused",
    "aten::rnn_tanh.data": "of packed sequences, which are refused",
    "aten::rnn_relu.data": "of packed sequences, which are refused",
    "aten::stft.center": "torch.stft pads before it calls the operator",
}


class Argument(str):
    """Stands for the argument of this name."""


def signatures(target):
    """torch's signatures of a callable: each one's text, and its parameters' names, defaults and whether by keyword."""
    if isinstance(target, torch._ops.OpOverload):
        schemas = [target._schema]
    elif isinstance(target, torch._ops.OpOverloadPacket):
        schemas = schemas_of(target)
    elif isinstance(target, types.FunctionType):
        found = inspect.signature(target)
        if "args" in found.parameters and "kwargs" in found.parameters:  # it is one of two, chosen by an argument
            found = inspect.signature(getattr(torch.nn.functional, f"{target.__name__}_with_indices", None))
        return [in_python(found)]
    else:
        name = getattr(target, "__name__", "__")
        schemas = [] if name.startswith("__") else schemas_of(getattr(torch.ops.aten, name, None))
    if not schemas and target in OVERRIDES:
        return [in_python(inspect.signature(OVERRIDES[target]))]
    return [in_schema(schema) for schema in schemas]


def schemas_of(packet):
    """The schemas of an operator that are of tensors and return new ones."""
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet else []
    return [
        schema
        for schema in schemas
        if f"{schema.name}.{schema.overload_name}".rstrip(".") not in FOREIGN
        and any("Tensor" in str(value.type) for value in (*schema.arguments, *schema.returns))
        and any("Tensor" in str(value.type) for value in schema.returns)
        and not any("Dimname" in str(argument.type) or argument.is_out for argument in schema.arguments)
        and "Dimname" not in schema.overload_name  # torch 2.11 says str for some
        and not schema.is_mutable
    ]


def in_python(signature):
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = [p for p in signature.parameters.values() if p.kind not in kinds and p.name not in IGNORED]
    return str(signature), [(p.name, p.default, p.kind is p.KEYWORD_ONLY) for p in parameters]


def in_schema(schema):
    absent = inspect.Parameter.empty
    return str(schema), [
        (a.name, a.default_value if a.has_default_value() else absent, a.kwarg_only)
        for a in schema.arguments
        if a.name not in IGNORED
    ]


def bound(function, args, kwargs):
    """Which argument each parameter of a converter or composite receives."""
    signature = inspect.signature(function)
    if function in {inspect.unwrap(body) for body in REGISTRY.composites.values()}:
        found = signature.bind(*args, **renamed(kwargs, signature.parameters))
    else:
        args, kwargs = Converter(function, "", tuple(signature.parameters.values())[1:]).bind(args, kwargs)
        found = signature.bind(None, *args, **kwargs)
    found.apply_defaults()
    return found


def misfits(function, target, parameters):
    """Where a call as torch's signature has it does not mean to the converter what it means to torch."""
    args = [Argument(name) for name, _, keyword in parameters if not keyword]
    kwargs = {name: Argument(name) for name, _, keyword in parameters if keyword}
    calls = [(args, kwargs)]
    operators = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)
    by_name = not isinstance(target, operators) and not target.__name__.startswith("__")
    if by_name:
        calls.append((args[:1], {**{name: name for name in args[1:]}, **kwargs}))
    if by_name and getattr(torch.Tensor, getattr(target, "__name__", ""), None) is not target:
        calls.append(([], {**{"input" if name == "self" else name: name for name in args}, **kwargs}))
    star = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    for args, kwargs in calls:
        try:
            found = bound(function, tuple(args), dict(kwargs))
        except TypeError as error:
            yield str(error)
            continue
        for name, value in found.arguments.items():
            if isinstance(value, Argument) and found.signature.parameters[name].kind not in star:
                if by_name and name not in (value, ALIASES.get(value)) and (value, name) not in SHARED:
                    yield f"{value} is taken for {name}"
    required = [(name, keyword) for name, default, keyword in parameters if default is inspect.Parameter.empty]
    try:
        found = bound(
            function,
            tuple(Argument(n) for n, keyword in required if not keyword),
            {n: Argument(n) for n, keyword in required if keyword},
        )
    except TypeError as error:
        yield f"{error} by default"
        return
    for name, default, _ in parameters:
        ours = found.arguments.get(name, default)
        if default is not inspect.Parameter.empty and plain(ours) != plain(default):
            if not isinstance(ours, (Argument, dict)) and (name, default) not in DEFAULTS:
                yield f"{name} is {ours!r} by default, not {default!r}"


# Defaults of one of several signatures of a name, where that of another one is the converter's.
DEFAULTS = [("unbiased", True), ("padding", "valid"), ("return_indices", False)]


def plain(default):
    """A default without the difference of 1 and [1, 1], or of None and []."""
    if isinstance(default, (list, tuple)):
        return plain(default[0]) if len(set(default)) == 1 else tuple(default) or None
    return default


@pytest.mark.parametrize("family", FAMILIES)
def test_arguments_are_torchs(family):
    """In order and by name, all that torch's signatures have, with the same defaults."""
    wrong = []
    for function in of_family(family):
        for target in SERVED[function] if function.__name__ not in UNTOLD else []:
            for text, parameters in signatures(target):
                wrong += [f"{qualified_name(target)}: {m} ({text})" for m in misfits(function, target, parameters)]
    assert wrong == []


def test_most_callables_have_a_signature():
    known = [target for targets in SERVED.values() for target in targets if signatures(target)]
    assert len(known) > 0.95 * sum(map(len, SERVED.values()))


# Levels --------------------------------------------------------------------------------------------------------------

measured = pytest.mark.skipif(not operators.is_listed_version(), reason=f"measured with torch {operators.TORCH}")


@measured
@pytest.mark.parametrize("row", coverage.CASES, ids=lambda row: qualified_name(coverage.target(row)))
def test_functions_without_a_converter(row):
    """They are converted as the list says; `python -m harness.plain_functions` writes it."""
    level, network = coverage.level(row)
    assert qualified_name(coverage.target(row)) in operators.measured()[level]
    if network is not None:
        module, inputs, _ = prepared(row, "static", torch.device("cpu"))
        compare(ReferenceModule(network)(*inputs), eager(module, inputs), row.rtol, row.atol)


@measured
def test_every_public_function_is_listed():
    """It has a converter, an advice, a row in `harness/plain_functions.py`."""
    rows = [coverage.target(row) for row in coverage.CASES]
    unknown = [f for f in coverage.public() if f not in rows and not coverage.is_left_out(f)]
    assert [qualified_name(function) for function in unknown] == []
    assert [qualified_name(function) for function in rows if REGISTRY.find(function)] == []


@measured
def test_the_list_is_up_to_date():
    """`python -m torch2rt.cli.ops > docs/operators.md`"""
    assert (Path(__file__).parent.parent / "docs" / "operators.md").read_text() == operators.markdown()
