"""Parts of a module as engines, where the whole has Python that no graph can have: detectors, for instance."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.convert import torch2rt
from torch2rt.errors import InputError, Torch2RTError
from torch2rt.runtime.converted import Converted
from torch2rt.structure import flatten, is_same
from torch2rt.tracing.trace import as_arguments

Call = tuple[tuple[Any, ...], dict[str, Any]]
UNSERVED = ("refuse", "torch")


@torch.no_grad()
def convert_submodules(
    module: torch.nn.Module,
    submodules: Iterable[str] | Mapping[str, Mapping[str, Any]],
    inputs: Any,
    *,
    kwargs: Mapping[str, Any] | None = None,
    others: Sequence[Any] = (),
    unserved: str = "refuse",
    **options: Any,
) -> dict[str, Any]:
    """Convert some submodules of a module, in place, for the tensors that they are called with in a run of it.

    - `submodules`: their paths, such as `["backbone", "head"]`; or a dict from the paths to further arguments of
      `torch2rt.torch2rt` for each, such as `{"backbone": {}, "head": {"max_shapes": [(1000, 256, 7, 7)]}}`.
    - `inputs`, `kwargs`: the arguments of the example call of the whole module, which runs once.
    - `others`: the positional arguments of further calls, in lists. Where a submodule is called with tensors of other
      sizes there, or in several calls of one run, the range between the sizes is served.
    - `unserved`: what becomes of a later call whose tensors are not served. `"refuse"` raises `InputError`, `"torch"`
      calls the submodule itself, which stays in memory beside its engine.
    - Other options are those of `torch2rt.torch2rt`, for all of them.

    Returns what takes the place of each submodule, by its path. Nothing is replaced if one cannot be converted.

    Raises `InputError` for a path that leads to no module, for a submodule that is not called, and for one that is
    called in several forms; and whatever `torch2rt.torch2rt` raises.

    >>> model = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()).eval()
    >>> convert_submodules(model, ["0"], [torch.randn(2, 3)], others=[[torch.randn(7, 3)]])["0"].input_names
    ['input']
    """
    if unserved not in UNSERVED:
        raise InputError(f"{unserved=} is not one of {', '.join(map(repr, UNSERVED))}.")
    wanted = dict(submodules) if isinstance(submodules, Mapping) else {path: {} for path in submodules}
    children = {path: _submodule(module, path) for path in wanted}
    for path in wanted:
        if outer := next((p for p in wanted if path.startswith(f"{p}.")), None):
            raise InputError(f"'{path}' is a part of '{outer}', which is converted as a whole. Leave one of them out.")
    calls = _calls(module, children, [as_arguments(inputs, kwargs), *(as_arguments(x, None) for x in others)])
    converted: dict[str, Any] = {}
    for path, child in children.items():
        args, keywords = calls[path][0]
        ranges = _ranges(path, calls[path])
        arguments = {**options, **ranges, **wanted[path]}
        try:
            converted[path] = torch2rt(child, args, kwargs=keywords, **arguments)
        except Torch2RTError as error:
            error.args = (f"The submodule '{path}' is not converted: {error}", *error.args[1:])
            raise
    for path, model_trt in converted.items():
        parent, _, name = path.rpartition(".")
        new = OrTorch(model_trt, children[path]) if unserved == "torch" else model_trt
        setattr(module.get_submodule(parent), name, new)
        converted[path] = new
    return converted


class OrTorch(torch.nn.Module):
    """A converted module, and the module itself for calls with tensors that the engine does not serve.

    Attributes: `converted` and `module`.
    """

    def __init__(self, converted: Converted, module: torch.nn.Module) -> None:
        super().__init__()
        self.converted, self.module = converted, module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the converted module if it serves these arguments, else the module."""
        interface = self.converted._interface()
        try:
            tensors = interface.tensors(args, kwargs)
            interface.check([tuple(x.shape) for x in tensors], [x.dtype for x in tensors])
        except InputError:
            return self.module(*args, **kwargs)
        return self.converted(*args, **kwargs)


def _submodule(module: torch.nn.Module, path: str) -> torch.nn.Module:
    try:
        if path:
            return module.get_submodule(path)
    except AttributeError:
        pass
    known = ", ".join(repr(name) for name, _ in module.named_children())
    raise InputError(f"The module has no submodule '{path}'. Its children are {known}.")


def _calls(module: torch.nn.Module, children: Mapping[str, torch.nn.Module], runs: Sequence[Call]) -> dict[str, Any]:
    """The arguments with which each submodule is called in these runs of the module."""
    calls: dict[str, list[Call]] = {path: [] for path in children}

    def note(path: str) -> Any:
        def hook(child: torch.nn.Module, args: Any, kwargs: Any) -> None:
            calls[path].append(torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, (args, kwargs)))

        return hook

    handles = [child.register_forward_pre_hook(note(path), with_kwargs=True) for path, child in children.items()]
    try:
        for args, kwargs in runs:
            module(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    if silent := [path for path, found in calls.items() if not found]:
        raise InputError(f"The module does not call its submodule '{silent[0]}' with these inputs.")
    return calls


def _ranges(path: str, calls: Sequence[Call]) -> dict[str, Any]:
    """The smallest and largest shapes of a submodule's calls, if they differ."""
    leaves, spec = flatten(calls[0], torch.is_tensor, f"the arguments of '{path}'")
    shapes = [[tuple(x.shape) for x in leaves]]
    for call in calls[1:]:
        other, form = flatten(call, torch.is_tensor, f"the arguments of '{path}'")
        same = is_same(form, spec) and all(
            a.dim() == b.dim() and a.dtype == b.dtype for a, b in zip(leaves, other, strict=True)
        )
        if not same:
            raise InputError(f"The submodule '{path}' is called in several forms, which no single engine serves.")
        shapes.append([tuple(x.shape) for x in other])
    if all(each == shapes[0] for each in shapes):
        return {}
    low, high = ([tuple(map(end, *each)) for each in zip(*shapes, strict=True)] for end in (min, max))
    return {"min_shapes": low, "opt_shapes": shapes[0], "max_shapes": high}
