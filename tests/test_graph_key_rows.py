"""No two calls of a converter's rows that differ in an argument, an attribute or a constant share a key.

Of each row, one argument after the other is changed. Where the graphs have one key all the same, torch must compute the
same for both, bit for bit.
"""

import copy
import importlib
import random
import sys
from pathlib import Path

import torch
from harness.cases import Case, prepared
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from torch2rt import trace
from torch2rt.errors import Torch2RTError
from torch2rt.graph_key import Unkeyable, content, graph_key
from torch2rt.passes.order import chosen, run

FOLDER = Path(__file__).parent / "converters"


def rows(names):
    """The rows in the tables of some test files of converters."""
    sys.path.insert(0, str(FOLDER))
    try:
        files = [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(FOLDER))
    tables = [value for file in files for value in vars(file).values() if isinstance(value, list)]
    return [row for table in tables for row in table if isinstance(row, Case)]


def others(value):
    """Values near another one, of the same kind."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1, float(value)]
    if isinstance(value, float):
        return [value + 0.25, -value, 0.0]
    if isinstance(value, torch.dtype):
        return [torch.float16, torch.int32, torch.float32]
    if isinstance(value, torch.Tensor) and value.numel() and not value.is_complex():
        changed = value.detach().clone()
        changed.view(-1)[-1] = (
            changed.view(-1)[-1].logical_not() if value.dtype is torch.bool else 1 - changed.view(-1)[-1]
        )
        return [changed]
    if isinstance(value, str):
        return [other for other in ("mean", "sum", "none", "tanh", "reflect", "zeros", "floor") if other != value]
    return []


def changed(module):
    """Copies of a module that differ in one place, and what it is."""
    for path, owner in module.named_modules():
        for name, value in vars(owner).items():
            if name.startswith("_") and name not in ("_parameters", "_buffers") or name in ("training", "function"):
                continue
            leaves, form = tree_flatten(value)
            for place, leaf in enumerate(leaves):
                for other in others(leaf):
                    again = copy.deepcopy(module)
                    mine = tree_unflatten([*leaves[:place], other, *leaves[place + 1 :]], form)
                    if isinstance(leaf, torch.nn.Parameter):
                        mine = {
                            k: v if v is None or isinstance(v, torch.nn.Parameter) else torch.nn.Parameter(v, False)
                            for k, v in mine.items()
                        }
                    vars(again.get_submodule(path))[name] = mine
                    yield f"{path}.{name}[{place}] = {other!r}", again


def keyed(module, inputs, shapes):
    graph = trace(module, inputs, **shapes)
    return graph_key(run(graph, chosen(None, "float32")), content)


def computed(module, inputs):
    torch.manual_seed(3)
    with torch.no_grad():
        return [x for x in tree_leaves(module(*[x.clone() for x in inputs])) if isinstance(x, torch.Tensor)]


def is_same(a, b):
    return len(a) == len(b) and all(
        x.dtype == y.dtype
        and x.shape == y.shape
        and torch.equal(x.nan_to_num(7), y.nan_to_num(7))
        and torch.equal(x.isnan(), y.isnan())
        and (x.is_complex() or torch.equal(x.signbit(), y.signbit()))
        for x, y in zip(a, b)
    )


def test_one_difference_is_another_key(request):
    most, draw = request.config.getoption("--changed-rows"), random.Random(6)
    names, seen = sorted(file.stem for file in FOLDER.glob("test_*.py")), 0
    every = rows(draw.sample(names, 4) if most else names)  # importing them all takes seconds
    for row in draw.sample(every, len(every)):
        mode = draw.choice(row.modes)
        torch.manual_seed(1)
        module, inputs, shapes = prepared(row, mode, torch.device("cpu"))
        variants = list(changed(module))
        if most and variants:
            variants = draw.sample(variants, 1)
        try:
            expected, key = computed(module, inputs), keyed(module, inputs, shapes) if variants else ""
        except (Torch2RTError, Unkeyable, RuntimeError, TypeError, ValueError, NotImplementedError):
            continue
        for what, other in variants:
            try:
                found, other_key = computed(other, inputs), keyed(other, inputs, shapes)
            except (Torch2RTError, Unkeyable, RuntimeError, TypeError, ValueError, IndexError, NotImplementedError):
                continue  # torch or torch2rt refuses it
            seen += 1
            assert other_key != key or is_same(expected, found), f"{row.id}, {mode}: {what}"
        if most and seen >= most:
            break
    assert seen >= (most or 1000)
