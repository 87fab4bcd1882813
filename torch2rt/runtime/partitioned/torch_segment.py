"""Run: the calls of a segment that stay torch calls."""

from __future__ import annotations

import copy
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch.export.passes import move_to_device_pass
from torch.fx.node import map_aggregate

from torch2rt.engine.artifact import digest, seal, unseal
from torch2rt.engine.engine import stored, to_tensor
from torch2rt.errors import EngineError
from torch2rt.graph import graph_meta
from torch2rt.interface import Interface
from torch2rt.passes.copies import copy_graph, finish
from torch2rt.runtime.converted import Converted
from torch2rt.runtime.partitioned import exported

BACKEND = "inductor"


class TorchSegment(Converted):
    """Calls of a traced graph as a function of tensors, on the device of its inputs.

    - `graph`: a `torch.fx.GraphModule` of tensors in and a tuple of tensors out. Copies of its parameters and buffers
      become buffers of the segment: as the engines beside it, it keeps the values of the conversion.
    - `device`: where its calls are made. `draws`: whether it draws random numbers.
    - `compiles`: whether torch's compiler makes kernels of the calls, at the first one.
    - `waits`: whether it is known to wait for the GPU, as for sizes that depend on values.

    `load_state_dict` fills `TorchSegment()`. What is saved is an exported program: data, and no code.
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule | None = None,
        device: torch.device | None = None,
        draws: bool = False,
        compiles: bool = False,
        waits: bool = False,
    ) -> None:
        super().__init__()
        self.device, self.draws, self.compiles, self.waits = device or torch.device("cpu"), draws, compiles, waits
        self._compiled: list[Any] = []
        self._original: tuple[TorchSegment, ...] = ()  # of a replica
        self._others: dict[torch.device, TorchSegment] = {}  # where replicas run
        self._lock = threading.Lock()
        self.interface: Interface | None = None
        self.program: torch.export.ExportedProgram | None = None  # where the calls were loaded
        self._graph: list[Any] = [None]  # in a list, as the state dict is the segment's own and not its parts'
        if graph is not None:
            self._graph, self.interface = [_prepared(graph, _Copies())], graph_meta(graph).interface

    @property
    def graph(self) -> Any:
        """The module that makes the calls: a `torch.fx.GraphModule`, or what torch has made of the exported program."""
        return self._graph[0]

    @property
    def calls(self) -> int:
        """How many calls there are."""
        nodes = self.graph.graph.nodes if hasattr(self.graph, "graph") else ()
        return sum(node.op == "call_function" and node.target is not operator.getitem for node in nodes)

    def _interface(self) -> Interface:
        if self.interface is None:
            raise EngineError("This TorchSegment is empty: fill it with load_state_dict.")
        return self.interface

    def forward(self, *tensors: torch.Tensor) -> Any:
        """The tuple of results; a first call on another device moves the constants there."""
        if self._original:
            device = next((t.device for t in tensors if t.is_cuda), tensors[0].device if tensors else self.device)
            return self._original[0].on(device).forward(*tensors)
        if tensors and (tensors[0].device != self.device or self.device.type == "cpu"):
            # the first may be a 0-d tensor, which torch leaves on the CPU
            device = next((t.device for t in tensors if t.is_cuda), tensors[0].device)
            if device.type != self.device.type or (device.type == "cuda" and device != self.device):
                self.move(device)
        graph = self._graph[0]
        if self.compiles:
            if not self._compiled:
                self._compiled = [torch.compile(graph, backend=BACKEND)]
            graph = self._compiled[0]
        elif self.program is None:
            return graph.forward(*tensors)  # torch's own call of a module takes longer than small kernels
        return graph(*tensors) if self.program is None else graph(tensors)

    def move(self, device: torch.device) -> None:
        """Run on another device from now on: constants are copied there, and calls that name the old one name it."""
        old, self.device = self.device, device
        self._compiled = []
        if self.program is not None:
            self.program = move_to_device_pass(self.program, device)
            self._graph = [self.program.module()]
            return
        self.graph.to(device)
        if isinstance(self.graph, torch.fx.GraphModule):
            for node in self.graph.graph.nodes:
                node.args, node.kwargs = (
                    map_aggregate(a, lambda v: device if isinstance(v, torch.device) and v.type == old.type else v)
                    for a in (node.args, node.kwargs)
                )
            self.graph.recompile()

    def on(self, device: torch.device) -> TorchSegment:
        """The segment on this device: itself, or a copy of it there, which is kept for the next time."""
        if device.type == self.device.type and device.index in (self.device.index, None):
            return self
        with self._lock:
            if (there := self._others.get(device)) is None:
                there = self.copy()
                there.move(device)
                self._others[device] = there
            return there

    def _replicate_for_data_parallel(self) -> Any:
        """A replica runs on the device of its inputs, and leaves this segment where it is."""
        replica = super()._replicate_for_data_parallel()
        replica._original = (self,)  # in a tuple, as it is no part of the replica
        return replica

    def copy(self) -> TorchSegment:
        """A segment of its own with the same tensors, which can be on another device."""
        copied = TorchSegment(None, self.device, self.draws, self.compiles, self.waits)
        copied.interface, copied.program = self.interface, self.program
        copied._graph = [_prepared(self.graph) if self.program is None else self.program.module()]
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TorchSegment:
        memo[id(self)] = copied = TorchSegment(None, self.device, self.draws, self.compiles, self.waits)
        copied.interface = self.interface
        copied.program, copied._graph = copy.deepcopy((self.program, self._graph), memo)
        return copied

    def constants(self) -> Iterator[torch.Tensor]:
        """The tensors that it keeps between calls."""
        yield from self.graph.parameters()
        yield from self.graph.buffers()
        if self.program is not None:
            yield from (value for value in self.program.constants.values() if isinstance(value, torch.Tensor))

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        where = fn(torch.empty(0, device=self.device)).device
        if where != self.device:
            self.move(where)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        interface = self._interface()
        function = _OfTuple(self.graph) if self.program is None else self.graph
        program = exported.dump(function, interface, self.device)
        device, draws = str(self.device), self.draws
        header = {"interface": interface.to_json(), "device": device, "draws": draws, "digest": digest(program)}
        header["compiles"], header["waits"] = self.compiles, self.waits
        destination[prefix + "program"] = to_tensor(program)
        destination[prefix + "header"] = to_tensor(seal(header))

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        if (kept := stored(state_dict, prefix, ("program", "header"), missing_keys, unexpected_keys)) is not None:
            data, text = kept
            try:
                header = unseal(text, ("interface", "device", "draws", "digest", "compiles", "waits"))
                self.interface, self.draws = Interface.from_json(header["interface"]), bool(header["draws"])
                self.device = torch.device(header["device"])
                self.compiles, self._compiled = bool(header.get("compiles")), []
                self.waits = bool(header.get("waits"))
            except Exception as error:
                raise EngineError(f"A torch segment's header is damaged ({type(error).__name__}: {error}).") from error
            if header.get("digest", digest(data)) != digest(data):
                raise EngineError("A torch segment is truncated or damaged: it has not the digest that it states.")
            self.program = exported.load(data)
            self._graph = [self.program.module()]


class _OfTuple(torch.nn.Module):
    """A graph as a function of one tuple, as `torch.export` takes functions of any number of tensors."""

    def __init__(self, graph: torch.nn.Module) -> None:
        super().__init__()
        self.calls = graph

    def forward(self, tensors: tuple[torch.Tensor, ...]) -> Any:
        return self.calls(*tensors)


class _Copies:
    """Copies of tensors, and of graphs with their tensors; those that are one have one."""

    def __init__(self) -> None:
        self.made: dict[Any, tuple[Any, Any]] = {}

    def __call__(self, value: Any) -> Any:
        if isinstance(value, torch.fx.GraphModule):
            return finish(copy_graph(value, self))
        if not isinstance(value, torch.Tensor):
            return value
        is_plain = type(value) in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer) and value.layout is torch.strided
        key = (value.data_ptr(), value.dtype, value.shape, value.stride()) if is_plain else id(value)
        if key not in self.made:
            self.made[key] = value, value.detach().clone()
        return self.made[key][1]


def _prepared(
    graph: torch.fx.GraphModule, constant: Callable[[Any], Any] = lambda value: value
) -> torch.fx.GraphModule:
    """A copy of a graph module to run by itself, with what `constant` makes of its constants.

    It has buffers in the place of parameters, so that moving it leaves the module's own alone. What engines return is
    contiguous whatever the module's own values are, so that a view may have to be a copy.
    """
    graph = copy_graph(graph, constant)
    for name, parameter in list(graph.named_parameters(remove_duplicate=False)):
        path, _, leaf = name.rpartition(".")
        owner = graph.get_submodule(path)
        delattr(owner, leaf)
        owner.register_buffer(leaf, parameter.detach())
    for node in graph.graph.nodes:
        if node.target in _VIEWS and not isinstance(node.args[1], torch.dtype) and "dtype" not in node.kwargs:
            node.target = _VIEWS[node.target]
    graph.recompile()
    return graph


_VIEWS: dict[Any, Any] = {
    torch.Tensor.view: torch.Tensor.reshape,
    torch.ops.aten.view.default: torch.ops.aten.reshape.default,
}
