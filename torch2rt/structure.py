"""Nested Python values as a flat list of tensors plus a JSON-ready description, and back.

Arguments and results of a module may nest tensors in tuples, lists, dicts, named tuples, dataclasses and objects that
are no more than their attributes, beside plain constants. `flatten` takes such a value apart, `unflatten` puts new
leaves into the same shape. A description holds only JSON values, so that it can be stored beside an engine and read
back without unpickling anything.
"""

from __future__ import annotations

import collections
import collections.abc
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torch2rt.errors import EngineError, InputError

Spec = Any
CONSTANTS = (type(None), bool, int, float, str)
CONTAINERS = (dict, collections.UserDict, tuple, list)


def flatten(value: Any, is_leaf: Callable[[Any], bool], what: str = "value") -> tuple[list[Any], Spec]:
    """The leaves of a nested value, depth first, and the description that `unflatten` takes.

    Raises `InputError` naming the place (`what` is its root) of anything that is neither leaf, constant nor container.

    >>> flatten({"a": torch.ones(2), "b": [None, torch.zeros(1)]}, torch.is_tensor)[1]
    {'dict': ['a', 'b'], 'items': [{'leaf': 0}, {'list': [{'constant': None}, {'leaf': 1}]}]}
    """
    leaves: list[Any] = []

    def walk(value: Any, path: str) -> Spec:
        if is_leaf(value):
            leaves.append(value)
            return {"leaf": len(leaves) - 1}
        if isinstance(value, CONSTANTS):
            return {"constant": value}
        if isinstance(value, torch.dtype):
            return {"dtype": bare_name(value)}
        if isinstance(value, torch.device):
            return {"device": str(value)}
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value)]
            items = [walk(getattr(value, name), f"{path}.{name}") for name in fields]
            return {"dataclass": fields, "class": _path_of(type(value)), "items": items}
        if isinstance(value, (dict, collections.UserDict)):
            keys = list(value)
            for key in keys:
                if not isinstance(key, CONSTANTS):
                    raise InputError(f"{path}: dict key {key!r} is not a string, number, bool or None.")
            items = [walk(value[key], f"{path}[{key!r}]") for key in keys]
            spec: Spec = {"dict": keys, "items": items}
            return spec if type(value) is dict else {**spec, "class": _path_of(type(value))}
        if isinstance(value, (tuple, list)):
            items = [walk(item, f"{path}[{i}]") for i, item in enumerate(value)]
            if type(value) in (tuple, torch.Size):
                return {"tuple": items}
            if type(value) is list:
                return {"list": items}
            return {"sequence": items, "class": _path_of(type(value))}
        if isinstance(value, type):
            return {"type": _path_of(value)}
        if is_object(value):
            names = list(vars(value))
            items = [walk(item, f"{path}.{name}") for name, item in vars(value).items()]
            return {"object": names, "class": _path_of(type(value)), "items": items}
        raise InputError(
            f"{path}: a {type(value).__name__} is not a tensor, a constant, or a tuple, list, dict, dataclass or plain "
            "object of them."
        )

    return leaves, walk(value, what)


def is_object(value: Any) -> bool:
    """Whether a value is an object that is no more than its attributes, such as a cache of transformers' decoders."""
    cls = type(value)
    return (
        hasattr(value, "__dict__")
        and cls.__new__ is object.__new__
        and cls.__reduce__ is object.__reduce__
        and cls.__setattr__ is object.__setattr__
        and not callable(value)
        and not isinstance(value, (type(torch), torch.nn.Module, CONTAINERS))
        and not any(vars(c).get("__slots__") for c in cls.__mro__)
        and not dataclasses.is_dataclass(value)
    )


def objects_in(value: Any) -> Iterator[Any]:
    """The outermost objects within a value, in the order of `flatten`."""
    if is_object(value):
        yield value
    elif isinstance(value, CONTAINERS):
        for item in value.values() if isinstance(value, (dict, collections.UserDict)) else value:
            yield from objects_in(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from objects_in(getattr(value, field.name))


def take(spec: Spec, value: Any, tensors: list[Any]) -> bool:
    """Append the tensors of a value that plainly has this description; `False` if it takes `flatten` to tell.

    That is an eighth of the time: `flatten` has to find out what a value is, and to say where something is wrong.
    """
    if "leaf" in spec:
        tensors.append(value)
        return isinstance(value, torch.Tensor)
    if "constant" in spec:
        constant = spec["constant"]
        return value is constant or (type(value) is type(constant) and repr(value) == repr(constant))
    if "tuple" in spec:
        items, fits = spec["tuple"], type(value) is tuple
    elif "list" in spec:
        items, fits = spec["list"], type(value) is list
    elif "dict" in spec and "class" not in spec:
        items, fits = spec["items"], type(value) is dict and list(map(repr, value)) == list(map(repr, spec["dict"]))
        value = value.values() if fits else ()
    else:
        return False
    return fits and len(items) == len(value) and all(take(item, part, tensors) for item, part in zip(items, value))


def unflatten(spec: Spec, leaves: Sequence[Any]) -> Any:
    """Put `leaves` where `flatten` found its own."""
    if "leaf" in spec:
        return leaves[spec["leaf"]]
    if "constant" in spec:
        return spec["constant"]
    if "dtype" in spec:
        return getattr(torch, spec["dtype"])
    if "device" in spec:
        return torch.device(spec["device"])
    if "tuple" in spec:
        return tuple(unflatten(item, leaves) for item in spec["tuple"])
    if "list" in spec:
        return [unflatten(item, leaves) for item in spec["list"]]
    if "sequence" in spec:
        sequence = _class_at(spec["class"], (tuple, list))
        items = [unflatten(item, leaves) for item in spec["sequence"]]
        return sequence(*items) if hasattr(sequence, "_fields") else sequence(items)
    if "type" in spec:
        return _class_at(spec["type"], (object,))
    items = [unflatten(item, leaves) for item in spec["items"]]
    if "object" in spec:
        cls = _class_at(spec["class"], (object,))
        result = object.__new__(cls)
        vars(result).update(zip(spec["object"], items, strict=True))
        if not is_object(result):
            raise EngineError(f"{spec['class']} is no longer a plain class, so the result cannot be put into one.")
        return result
    if "dataclass" in spec:
        cls = _class_at(spec["class"], (object,))
        if not hasattr(cls, "__dataclass_fields__"):
            raise EngineError(f"{spec['class']} is no longer a dataclass, so the result cannot be put into one.")
        fields = {f.name: f for f in dataclasses.fields(cls)}
        values = dict(zip(spec["dataclass"], items, strict=True))
        result = cls(**{name: value for name, value in values.items() if fields[name].init})
        for name, value in values.items():
            if not fields[name].init:
                object.__setattr__(result, name, value)
        return result
    pairs = zip(spec["dict"], items, strict=True)
    return _class_at(spec["class"], (dict, collections.UserDict))(pairs) if "class" in spec else dict(pairs)


def children(spec: Spec) -> dict[Any, Spec]:
    """The descriptions of a container's items, by index, key or field; none for anything else."""
    if "items" in spec:
        names = spec.get("dict", spec.get("dataclass", spec.get("object", ())))
        return dict(zip(names, spec["items"], strict=True))
    return dict(enumerate(spec.get("tuple", spec.get("list", spec.get("sequence", ())))))


def is_same(one: Spec, other: Spec) -> bool:
    """Whether two descriptions are one: as saved, where 1, 1.0 and True differ, and NaN equals itself."""
    return json.dumps(one) == json.dumps(other)


def bare_name(value: torch.dtype | torch.memory_format) -> str:
    """The name that torch has for a dtype or a memory format, such as `float16`: an attribute of `torch`."""
    return str(value).removeprefix("torch.")


def _path_of(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


def _class_at(path: str, bases: tuple[type, ...]) -> Any:
    module, _, name = path.partition(":")
    try:
        value: Any = importlib.import_module(module)
        for part in name.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise EngineError(f"The engine's result is a {path}, which cannot be imported here: {error}") from error
    if not (isinstance(value, type) and issubclass(value, bases)):
        raise EngineError(f"The engine's result is a {path}, which is not a container class.")
    return value


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements in their order, as a 1-d `uint8` tensor on its device.

    >>> import torch
    >>> as_bytes(torch.tensor([1, 258], dtype=torch.int16))
    tensor([1, 0, 2, 1], dtype=torch.uint8)
    """
    flat = tensor.detach().resolve_conj().resolve_neg().contiguous().flatten()
    return flat.as_strided(flat.shape, (1,)).view(torch.uint8)  # a single element is contiguous with any stride
