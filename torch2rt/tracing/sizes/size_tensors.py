"""Tensors made of sizes, such as `torch.tensor([height, width])`: their elements are sizes again.

Deformable attention computes with such a tensor (products, sums, slices) and splits by its elements. The graph computes
the tensor; beside it each element is known as a size, and takes the tensor's place where torch takes numbers.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from torch2rt.callables import Target
from torch2rt.errors import TraceError
from torch2rt.sizes import is_symbolic

MOST = 256  # elements of a tensor that is followed
WHOLE = (torch.int64, torch.int32)

_MADE = frozenset("tensor as_tensor asarray new_tensor".split())
_SAME = frozenset("to long int clone contiguous detach cpu cuda type".split())
_MOVED = frozenset(
    """
        __getitem__ select view reshape flatten unflatten unbind stack cat concat concatenate hstack split chunk
        split_with_sizes tensor_split flip unsqueeze squeeze permute transpose t swapaxes movedim expand repeat tile
        roll narrow index_select ravel expand_as view_as
    """.split()
)
_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "subtract": operator.sub,
    "mul": operator.mul,
    "multiply": operator.mul,
    "floor_divide": operator.floordiv,
    "floordiv": operator.floordiv,
    "remainder": operator.mod,
    "mod": operator.mod,
    "maximum": torch.sym_max,
    "minimum": torch.sym_min,
}
_UNARY: dict[str, Callable[[Any], Any]] = {"neg": operator.neg, "negative": operator.neg, "abs": abs, "absolute": abs}
_FOLDED: dict[str, Callable[[Any, Any], Any]] = {
    "prod": operator.mul,
    "sum": operator.add,
    "max": torch.sym_max,
    "amax": torch.sym_max,
    "min": torch.sym_min,
    "amin": torch.sym_min,
}
_TAKE_SIZES = frozenset(  # functions whose arguments after the first tensor are numbers
    """
        view reshape split split_with_sizes expand narrow unflatten repeat tile roll new_zeros new_ones new_empty
        new_full zeros ones empty full arange linspace interpolate pad chunk adaptive_avg_pool1d adaptive_avg_pool2d
        upsample select
    """.split()
)


class SizeTensors:
    """The tensors of one trace whose elements are sizes, and the elements."""

    def __init__(self) -> None:
        self._known: Any = WeakIdKeyDictionary()  # (the tensor's version, where each element is, all sizes)

    def elements(self, tensor: Any) -> tuple[torch.Tensor, list[Any]] | None:
        """Where in a list of sizes each element of a tensor is, and the list; `None` if the elements are no sizes."""
        if isinstance(tensor, FakeTensor):
            version, *found = self._known.get(tensor, (None,))
            return tuple(found) if version == tensor._version else None  # type: ignore[return-value]
        if type(tensor) is torch.Tensor and tensor.dtype in WHOLE and tensor.numel() <= MOST:
            return torch.arange(tensor.numel()).reshape(tensor.shape), tensor.flatten().tolist()
        return None

    # What a call is given ---------------------------------------------------------------------------------------------

    def value(self, func: Target, args: tuple[Any, ...], place: Callable[[], str]) -> Any:
        """What a tensor of sizes gives to Python, as `x.tolist()` does; `NotImplemented` for other calls."""
        name = getattr(func, "__name__", "")
        if name in ("__int__", "__float__") and self._known and self.elements(args[0]) is not None:
            raise TraceError(f"{place()}: Python makes a plain number of a size here. Write x.item() or x.tolist().")
        if name not in ("item", "tolist") or not self._known or not args or not isinstance(args[0], FakeTensor):
            return NotImplemented
        found = self.elements(args[0])
        if found is None or (name == "item" and found[0].numel() != 1):
            return NotImplemented
        places, sizes = found
        return _nested((places.reshape(()) if name == "item" else places).tolist(), sizes)

    def replaced(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """A call's arguments with sizes for the tensors without dimensions that stand for numbers."""
        name = getattr(func, "__name__", "").split(".")[0]
        if not self._known or not args or (name not in _TAKE_SIZES and name not in ("__getitem__", "__setitem__")):
            return args, kwargs
        if name in ("__getitem__", "__setitem__"):
            return (args[0], self._in_slices(args[1]), *args[2:]), kwargs
        first = isinstance(args[0], torch.Tensor) and (args[0].dim() > 0 or self.elements(args[0]) is None)
        head, rest = (args[:1], args[1:]) if first else ((), args)
        return (*head, *map(self._number, rest)), {key: self._number(value) for key, value in kwargs.items()}

    def _number(self, value: Any) -> Any:
        if type(value) in (tuple, list):
            return type(value)(map(self._number, value))
        if isinstance(value, FakeTensor) and not value.dim() and (found := self.elements(value)) is not None:
            return found[1][int(found[0])]
        return value

    def _in_slices(self, index: Any) -> Any:
        if isinstance(index, tuple):
            return tuple(map(self._in_slices, index))
        if isinstance(index, slice):
            return slice(*(self._number(bound) for bound in (index.start, index.stop, index.step)))
        return index

    # What a call gives ------------------------------------------------------------------------------------------------

    def note(self, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """Look whether the elements of what a call has returned are sizes."""
        name = getattr(func, "__name__", "").split(".")[0]
        if name in _MADE:
            data = args[1] if name == "new_tensor" else args[0] if args else kwargs.get("data")
            if isinstance(out, FakeTensor) and out.dtype in WHOLE and isinstance(data, (list, tuple)):
                leaves = [self._number(leaf) for leaf in tree_leaves(data)]
                if all(is_symbolic(leaf) or type(leaf) is int for leaf in leaves) and _is_small(out):
                    self._keep(out, torch.arange(len(leaves)).reshape(tuple(map(int, out.shape))), leaves)
            return
        if not self._known or not any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((args, kwargs))):
            return
        outs = out if isinstance(out, (tuple, list)) else (out,)
        if not outs or not all(isinstance(o, FakeTensor) and o.dtype in WHOLE and _is_small(o) for o in outs):
            return
        for tensor, (places, sizes) in zip(outs, self._computed(name, func, args, kwargs), strict=False):
            if tuple(places.shape) == tuple(tensor.shape):
                self._keep(tensor, places, sizes)

    def _keep(self, tensor: torch.Tensor, places: torch.Tensor, sizes: list[Any]) -> None:
        self._known[tensor] = (tensor._version, places, sizes)

    def _computed(
        self, name: str, func: Target, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[tuple[torch.Tensor, list[Any]]]:
        """The elements of each tensor that a call returns; nothing if they are not known."""
        sizes: list[Any] = []

        def places(value: Any) -> Any:
            """An argument with the places of the elements in `sizes` in the place of its tensors."""
            if isinstance(value, torch.Tensor):
                if (found := self.elements(value)) is None:
                    raise LookupError
                sizes.extend(found[1])
                return found[0] + (len(sizes) - len(found[1]))
            return type(value)(map(places, value)) if type(value) in (tuple, list) else value

        try:
            if name in _SAME:
                yield places(args[0]), sizes
            elif name in _MOVED:
                index = args[1:] if name in ("__getitem__", "index_select") else tuple(map(places, args[1:]))
                if any(isinstance(leaf, FakeTensor) for leaf in tree_leaves((index, kwargs))):
                    return
                moved = func(places(args[0]), *index, **kwargs)
                yield from ((one, sizes) for one in (moved if isinstance(moved, (tuple, list)) else (moved,)))
            elif (of_two := _ARITHMETIC.get(name.removeprefix("__r").strip("_"))) and len(args) == 2 and not kwargs:
                a, b = (places(x) if isinstance(x, torch.Tensor) else places(torch.tensor(0)) * 0 - 1 for x in args)
                a, b = torch.broadcast_tensors(a, b)
                if name.startswith("__r"):
                    a, b, args = b, a, args[::-1]
                pairs = zip(a.flatten().tolist(), b.flatten().tolist(), strict=True)
                at = lambda i, x: x if i < 0 else sizes[i]  # noqa: E731
                results = [of_two(at(i, args[0]), at(j, args[1])) for i, j in pairs]
                yield torch.arange(len(results)).reshape(a.shape), results
            elif (of_one := _UNARY.get(name.strip("_"))) is not None:
                each = places(args[0])
                yield (
                    torch.arange(each.numel()).reshape(each.shape),
                    [of_one(sizes[i]) for i in each.flatten().tolist()],
                )
            elif (name in _FOLDED or name == "cumsum") and not any(isinstance(a, torch.Tensor) for a in args[1:]):
                yield _reduced(name, places(args[0]), sizes, *args[1:], **kwargs)
        except (LookupError, TypeError, RuntimeError):
            return


def _is_small(tensor: torch.Tensor) -> bool:
    return not any(map(is_symbolic, tensor.shape)) and tensor.numel() <= MOST


def _nested(places: Any, sizes: list[Any]) -> Any:
    return [_nested(item, sizes) for item in places] if isinstance(places, list) else sizes[places]


def _reduced(
    name: str, places: torch.Tensor, sizes: list[Any], dim: int | None = None, keepdim: bool = False, dtype: Any = None
) -> tuple[torch.Tensor, list[Any]]:
    """A product, sum or running sum over one dimension, or over all."""
    rows = places.reshape(1, -1) if dim is None else places.movedim(dim, -1)
    results: list[Any] = []
    for row in rows.reshape(-1, rows.shape[-1]).tolist():
        values = [sizes[place] for place in row]
        running = [*itertools.accumulate(values, _FOLDED.get(name, operator.add))]
        total = running[-1] if running else 1 if name == "prod" else 0
        results.extend(running if name == "cumsum" else [total])
    made = torch.arange(len(results))
    if name == "cumsum":
        return made.reshape(rows.shape).movedim(-1, -1 if dim is None else dim), results
    if dim is None:
        return made.reshape(()), results
    made = made.reshape(rows.shape[:-1])
    return (made.unsqueeze(dim) if keepdim else made), results
