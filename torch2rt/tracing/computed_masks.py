"""The elements that a computed mask selects: how many there are is known when the engine runs, and never needed.

`d[mask] = f(e[mask])` needs no selection: `f` may work on all elements, of which the mask then chooses. So `e[mask]` is
all of `e` together with the mask, for as long as it goes through element-wise calls, calls that work on each row by
itself, and sums and means over all rows. Everything else is refused at the line that asks for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import handle_torch_function

from torch2rt.callables import Target, functional
from torch2rt.errors import ConversionError

COUNTED = "how many elements a computed mask selects depends on data; keep all and use torch.where or a product"


class MaskIndices:
    """One of the index tensors that `torch.where(mask)` returns, which together are the mask."""

    __class__ = property(lambda self: torch.Tensor)  # type: ignore[assignment]  # what the module's isinstance sees

    def __init__(self, mask: torch.Tensor, dim: int) -> None:
        self.mask, self.axis, self.version = mask, dim, mask._version
        self.device, self.dtype = mask.device, torch.int64

    @classmethod
    def __torch_function__(cls, func: Target, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ConversionError(COUNTED)

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


class Selection:
    """`x[:, mask]`: all of `x`, and the mask over its dimensions from `first` on."""

    __class__ = property(lambda self: torch.Tensor)  # type: ignore[assignment]  # what the module's isinstance sees

    def __init__(self, values: torch.Tensor, mask: torch.Tensor, first: int, version: int | None = None) -> None:
        self.values, self.mask, self.first = values, mask, first
        self.version = mask._version if version is None else version

    @property
    def device(self) -> torch.device:
        return self.values.device

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    @property
    def rest(self) -> int:
        """How many dimensions there are behind those of the mask."""
        return self.values.dim() - self.mask.dim() - self.first

    def like(self, values: torch.Tensor) -> Selection:
        return Selection(values, self.mask, self.first, self.version)

    def fits(self, other: Selection) -> bool:
        """Whether another selection has the same elements."""
        return self.mask is other.mask and self.first == other.first and self.version == other.version

    def chooses(self) -> torch.Tensor:
        """The mask in the rank of the values."""
        if self.mask._version != self.version:
            raise ConversionError("the mask was written to after it has selected elements")
        return self.mask.reshape(*self.mask.shape, *[1] * self.rest)

    @classmethod
    def __torch_function__(cls, func: Target, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise ConversionError(COUNTED)

    def __getattr__(self, name: str) -> Any:
        return _attribute(self, name)


def _attribute(self: Any, name: str) -> Any:
    """An attribute of a tensor, asked for in the way that a trace can see."""
    found = getattr(torch.Tensor, name, None)
    if found is None:
        raise AttributeError(name)
    if not callable(found):
        return handle_torch_function(found.__get__, (self,), self)
    return lambda *args, **kwargs: handle_torch_function(found, (self,), self, *args, **kwargs)


def _operator(name: str) -> Callable[..., Any]:
    return lambda self, *args: _attribute(self, name)(*args)


_BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "and", "or", "xor", "matmul")
_OPERATORS = [
    *(f"__{kind}{name}__" for name in _BINARY for kind in ("", "r", "i")),
    *(f"__{name}__" for name in ("neg", "pos", "abs", "invert", "eq", "ne", "lt", "le", "gt", "ge", "len", "bool")),
    *(f"__{name}__" for name in ("int", "float", "index", "iter", "getitem", "setitem", "contains")),
]
for _owner in (Selection, MaskIndices):
    for _name in _OPERATORS:
        if hasattr(torch.Tensor, _name):
            setattr(_owner, _name, _operator(_name))
    _owner.__hash__ = object.__hash__  # type: ignore[method-assign]


def is_selected(value: Any) -> bool:
    """Whether this stands for what a computed mask selects; such objects call themselves tensors."""
    return type(value) in (Selection, MaskIndices)


# What may be done with a selection ------------------------------------------------------------------------------------

_ROWS = frozenset({"linear", "layer_norm", "rms_norm", "dropout"})  # work on the last dimensions
_ALONG = frozenset({"softmax", "log_softmax"})
_KEEPS = frozenset(
    """
        to float half bfloat16 int long bool type type_as clone detach contiguous relu gelu silu elu
        leaky_relu mish softplus hardswish hardsigmoid relu6 where
    """.split()
)


def selected(func: Target, *args: Any, **kwargs: Any) -> Any:
    """The result of a call with selections among its arguments."""
    given = [value for value in (*args, *kwargs.values()) if type(value) is Selection]
    if not given or any(type(value) is MaskIndices for value in (*args, *kwargs.values())):
        raise ConversionError(COUNTED)
    one = given[0]
    if not all(map(one.fits, given)):
        raise ConversionError("elements that different masks have selected meet; " + COUNTED)
    name = getattr(func, "__name__", "").strip("_")
    if name in ("sum", "mean") and args[0] is one:
        return _over_all(one, name, *args[1:], **kwargs)
    in_place = functional(func)
    if not _keeps_places(in_place or func, name, one, args, kwargs):
        raise ConversionError(COUNTED)
    plain = lambda value: value.values if type(value) is Selection else value  # noqa: E731
    result = (in_place or func)(*map(plain, args), **{key: plain(value) for key, value in kwargs.items()})
    if in_place is None:
        return one.like(result)
    if type(args[0]) is not Selection:
        raise ConversionError(COUNTED)
    args[0].values = result.to(args[0].values.dtype)
    return args[0]


def _keeps_places(func: Target, name: str, one: Selection, args: Any, kwargs: Any) -> bool:
    """Whether each row of a call's result comes of the same row of the selection alone."""
    if name in _ROWS:
        reach = len(args[1]) if name.endswith("norm") and isinstance(args[1], (tuple, list)) else 1
        return args[0] is one and one.rest >= reach and not any(type(v) is Selection for v in args[1:])
    if name in _ALONG:
        dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
        return isinstance(dim, int) and -one.rest <= dim < 0
    tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and type(v) is not Selection]
    if name not in _KEEPS and not _is_pointwise(name):
        return False
    return name in ("to", "type_as") or all(tensor.dim() <= one.rest for tensor in tensors)


_ATEN = {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "invert": "bitwise_not"}


def _is_pointwise(name: str) -> bool:
    """Whether torch itself says that an operator works element by element."""
    for spelling in (name, *([name[1:]] if name[:1] in "ri" else [])):
        spelling = _ATEN.get(spelling, spelling)
        spelling = f"bitwise_{spelling}" if spelling in ("and", "or", "xor") else spelling
        packet = getattr(torch.ops.aten, spelling, None)
        if packet is not None and any(
            torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
        ):
            return True
    return False


def _over_all(one: Selection, name: str, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> torch.Tensor:
    """A sum or a mean over all elements, or over all rows."""
    dims = None if dim is None else dim if isinstance(dim, (tuple, list)) else (dim,)
    if dims is not None and (keepdim or [d % (one.rest + one.first + 1) for d in dims] != [one.first]):
        raise ConversionError(COUNTED)
    rows = None if dims is None else tuple(range(one.first, one.first + one.mask.dim()))
    if name == "mean" and not (dtype or one.values.dtype).is_floating_point:
        raise ConversionError(f"torch takes no mean of {one.values.dtype}")
    mask, given = one.chooses(), dtype or one.values.dtype
    values = torch.where(mask, one.values, 0)
    if name == "mean":
        dtype = torch.promote_types(given, torch.float32)
    total = values.sum(dtype=dtype) if rows is None else values.sum(rows, dtype=dtype)
    if name == "sum":
        return total
    count = mask.expand(values.shape).sum() if rows is None else mask.sum()
    return (total / count).to(given)


def assign(x: torch.Tensor, mask: torch.Tensor, first: int, value: Selection) -> None:
    """`x[:, mask] = value`."""
    if not value.fits(Selection(x, mask, first)) or value.values.dim() != x.dim():
        raise ConversionError("the values were selected by another mask; " + COUNTED)
    x.copy_(torch.where(value.chooses(), value.values.to(x.dtype), x))
