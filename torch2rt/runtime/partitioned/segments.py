"""Run: a module that was cut into segments, engines and torch calls, as one `nn.Module`."""

from __future__ import annotations

import copy
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.backend.cuda import CapturePlace
from torch2rt.engine.artifact import seal, unseal
from torch2rt.engine.engine import stored, to_tensor
from torch2rt.engine.report import Report
from torch2rt.errors import EngineError, Torch2RTError
from torch2rt.interface import Interface
from torch2rt.runtime.converted import Converted, Loaded
from torch2rt.runtime.graph_cache import DEFAULT, GraphCache
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.graphed import GraphedRun, in_groups
from torch2rt.runtime.partitioned.growth import Growth
from torch2rt.runtime.partitioned.parts import Part
from torch2rt.runtime.partitioned.reference import PartitionedNetwork, PartitionedReference
from torch2rt.runtime.partitioned.schedule import Carriers, Runner, Running, Schedule, address
from torch2rt.runtime.partitioned.torch_segment import TorchSegment

FORMAT = 1
REMEMBERED = 4096  # shapes of calls, which are forgotten when there are more
KEYS = frozenset(("format", "interface", "schedule", "report", "torch", "eager", "is_bound"))


class PartitionedModule(Converted):
    """A converted module of which some calls stayed torch calls: `torch2rt(..., fallback=True)` makes it.

    It is called like the module, with tensors of the GPU. Its segments run one after the other in the order of the
    caller's CUDA stream, and nothing waits for the GPU but what torch itself waits for.

    Attributes: `segments` (a `TRTModule` or `TorchSegment` each), `schedule`, `interface`, `report` (with a line for
    each segment), `cuda_graph` and `borrow_outputs` (see `TRTModule.forward`).

    >>> model_trt = torch2rt(model, [x], fallback=True)     # doctest: +SKIP
    >>> print(model_trt.report)                             # doctest: +SKIP
    """

    def __init__(
        self,
        segments: Sequence[TRTModule | TorchSegment] = (),
        schedule: Schedule | None = None,
        interface: Interface | None = None,
        report: Report | None = None,
        eager: Mapping[int, TorchSegment] | None = None,
        make_network: Callable[[PartitionedModule], PartitionedNetwork] | None = None,
    ) -> None:
        super().__init__()
        self.segments = torch.nn.ModuleList(segments)
        self.eager = torch.nn.ModuleDict()  # torch's calls of engines that may meet sizes they do not serve
        for index, segment in (eager or {}).items():
            self.eager[str(index)] = segment
        self.growth = Growth(took=self._took)
        self.schedule, self.interface = schedule, interface
        self.report = report or Report()
        self._network: PartitionedNetwork | None = None
        self.traced: torch.fx.GraphModule | None = None  # the module's graph in its own types, for debug.compare
        self._make_network = make_network  # of the engines' networks, which are kept or can be made
        self._carriers = Carriers()
        self._graphs: bool | GraphCache = False
        self._borrows = False
        self._lock = threading.RLock()
        self._running: Running | None = None  # made at the first call
        self._known: set[Any] = set()  # shapes and dtypes of calls that are served
        self._forget()

    def _interface(self) -> Interface:
        if self.interface is None:
            raise EngineError("This PartitionedModule holds no segments yet: load them with load_state_dict.")
        return self.interface

    @property
    def engines(self) -> list[TRTModule]:
        """The segments that are engines, in their order."""
        return [segment for segment in self.segments if isinstance(segment, TRTModule)]

    @property
    def torch_segments(self) -> list[TorchSegment]:
        """The segments that are torch calls, in their order."""
        return [segment for segment in self.segments if isinstance(segment, TorchSegment)]

    @property
    def cuda_graph(self) -> bool | GraphCache:
        """Whether calls whose shapes come back are replayed as CUDA graphs, each of as many segments as possible."""
        return self._graphs

    @cuda_graph.setter
    def cuda_graph(self, value: bool | GraphCache) -> None:
        self._graphs, self._running = value, None
        for engine in self.engines:
            engine.cuda_graph = value

    @property
    def borrow_outputs(self) -> bool:
        """Whether the outputs of a replay of all segments are the graph's own, overwritten by the next call."""
        return self._borrows

    @borrow_outputs.setter
    def borrow_outputs(self, value: bool) -> None:
        self._borrows = value
        self._running = None

    @property
    def cuda_graph_refused(self) -> str | None:
        """Why some segments run without CUDA graphs although `cuda_graph` is set; `None` if they do not."""
        if not self.cuda_graph:
            return None
        reasons = {index: f"segment {index}: {why}" for index, why in sorted(self._refused.items())}
        for index, segment in enumerate(self.segments):
            if isinstance(segment, TRTModule) and (why := segment.cuda_graph_refused):
                reasons[index] = f"segment {index}: {why}"
        return "; ".join(reasons.values()) or None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the segments; raises `InputError` for tensors that do not fit."""
        if self.recomputed is not None and (result := self.recomputed(self, args, kwargs)) is not NotImplemented:
            return result
        interface = self._interface()
        is_plain = not kwargs and len(args) == interface.plain_inputs
        tensors: Any = args if is_plain and all(map(torch.is_tensor, args)) else interface.tensors(args, kwargs)
        shapes = [t.shape for t in tensors]
        if (known := (*shapes, *[t.dtype for t in tensors])) not in self._known:
            interface.check([tuple(shape) for shape in shapes], known[len(shapes) :])
            if len(self._known) >= REMEMBERED:
                self._known = set()
            self._known.add(known)
        outputs = self.run(tensors)
        if interface.plain_result is torch.Tensor:
            return outputs[0]
        if interface.plain_result is tuple:
            return tuple(outputs)
        return interface.wrap(outputs, [tuple(shape) for shape in shapes])

    def run(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The outputs for tensors that fit, in the order of the interface."""
        return (self._running or self._prepare())(tensors)

    def _prepare(self) -> Running:
        """The schedule with what makes the calls of each of its steps, made at the first call."""
        with self._lock:
            assert self.schedule is not None
            parts = [
                Part(index, segment, self._eager(index), self.growth)  # type: ignore[arg-type]
                for index, segment in enumerate(self.segments)
            ]
            cache = self._graphs if isinstance(self._graphs, GraphCache) else DEFAULT
            able = [
                bool(self._graphs) and i not in self._refused and part.may_be_captured() for i, part in enumerate(parts)
            ]
            groups = in_groups(able, self.schedule, [part.is_long() for part in parts])
            for index in [index for group in groups for index in group]:
                if isinstance(engine := self.segments[index], TRTModule):
                    engine.cuda_graph = False
            schedule, inside = self.schedule.together(groups)
            alone = [index for index in range(len(parts)) if not any(index in group for group in groups)]
            runners: dict[int, Runner] = {index: parts[index].runner() for index in alone}
            for group, (inputs, steps) in zip(groups, inside, strict=True):
                own = [parts[index] for index in group]
                borrow = self._borrows and set(steps.results) <= set(self.schedule.results)
                refuse = functools.partial(self._refuse, group.start)
                runners[group.start] = GraphedRun(
                    steps,
                    inputs,
                    own,
                    [part.runner() for part in own],
                    self._carriers,
                    self._places,
                    cache,
                    borrow,
                    refuse,
                )
            fresh = [i for i in alone if parts[i].has_own_results()]
            slots = [slot for i in fresh for slot in self.schedule.steps[i].outputs]
            ordered = [runners[index] for index in sorted(runners)]
            running = self._running = Running(schedule, ordered, self._carriers, self._constants, slots)
            return running

    def _refuse(self, start: int, place: int, reason: str) -> None:
        """Leave a segment out of CUDA graphs from the next call on."""
        with self._lock:
            self._refused[start + place], self._running = reason, None
            self.cuda_graph = self._graphs  # engines that no run has any more have graphs of their own

    def _took(self, index: int, larger: TRTModule) -> None:
        """A segment's engine was built again: keep its network, and what its own report says."""
        if self._network is not None:
            (self._network.parts[index],) = larger.networks()
        which = f"segment {index}, which was built again for larger sizes"
        if (verified := larger.report.verified) is not None and self.report.verified is not None:
            self.report.verified.notes.append(f"{which}: {verified}")
        for text in larger.report.assumptions:
            if (whole := f"{which}: {text}") not in self.report.assumptions:
                self.report.assumptions.append(whole)

    def _forget(self) -> None:
        """Prepare anew at the next call, as segments are others or elsewhere."""
        self._kept: set[int] | None = None
        self._running, self._known = None, set()
        self._refused: dict[int, str] = {}  # why segments cannot be captured
        self._places: dict[tuple[int, int], CapturePlace] = {}  # by GPU and stream

    def _eager(self, index: int) -> Any:
        return self.eager[str(index)] if str(index) in self.eager else None  # noqa: SIM401  (a ModuleDict has no get)

    def _make_contexts(self, count: int) -> None:
        for engine in self.engines:
            engine._make_contexts(count)

    def _constants(self) -> set[int]:
        if self._kept is None:
            parts = [*self.torch_segments, *self.eager.values()]
            self._kept = {address(t) for part in parts for t in part.constants()} - {0}
        return self._kept | self._carriers.addresses()

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self._forget()
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica has segments of its own, whose engines and torch calls are those of this module on its GPU."""
        replica = super()._replicate_for_data_parallel()
        replica._lock, replica._carriers, replica.growth = threading.RLock(), Carriers(), Growth(self.growth.is_bound)
        replica._forget()
        return replica

    def load(self, device: torch.device) -> Loaded:
        """Load the engines on a GPU; raises `EngineError` where they cannot run there."""
        for segment in self.torch_segments:
            if segment.draws and segment.device.type != device.type:
                raise EngineError(
                    f"it draws random numbers, which are others on {device} than on {segment.device}, where the "
                    "module is"
                )
        for engine in self.engines:
            engine.load(device)
        self._device = device
        return self

    @property
    def device(self) -> torch.device | None:
        """The GPU that the engines run on, if that is decided."""
        return getattr(self, "_device", None) or next((e.device for e in self.engines if e.device), None)

    @property
    def network(self) -> PartitionedNetwork | None:
        """What the segments were lowered to, if it is kept."""
        return self.kept()

    def kept(self) -> PartitionedNetwork | None:
        """The networks of all segments, made at first use; `None` where they were let go of, or never were there."""
        if self._network is None and self._make_network is not None:
            self._network = self._make_network(self)
        return self._network

    def drop_network(self) -> None:
        """Let go of the networks, and of the weights that they hold; `reference()` needs them."""
        self._network, self._make_network, self.growth.make = None, None, None
        self.traced = None
        for engine in self.engines:
            engine.drop_network()

    def reference(self) -> PartitionedReference:
        """The kept networks, evaluated with torch, and the torch calls, on whatever device the inputs are on."""
        if (partitioned := self.kept()) is None:
            raise Torch2RTError(
                "reference() needs the network: convert with keep_network=True; a loaded module has none."
            )
        reference = partitioned.reference()
        reference.recomputed = self.recomputed
        return reference

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        interface = self._interface()
        assert self.schedule is not None
        header = {
            "format": FORMAT,
            "interface": interface.to_json(),
            "schedule": self.schedule.to_json(),
            "report": self.report.to_json(),
            "torch": [isinstance(segment, TorchSegment) for segment in self.segments],
            "eager": list(self.eager),
            "is_bound": self.growth.is_bound,
        }
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
        """Make the segments that the state dict speaks of; torch then loads each of them."""
        kept = stored(state_dict, prefix, ("header",), missing_keys, unexpected_keys, ("segments", "eager"))
        if kept is None:
            return
        try:
            if (version := json.loads(kept[0])["format"]) != FORMAT:
                raise EngineError(f"The module was saved in format {version}, this torch2rt reads {FORMAT}.")
            header = unseal(kept[0], KEYS)
            interface, schedule = Interface.from_json(header["interface"]), Schedule.from_json(header["schedule"])
            report = Report.from_json(header["report"])
        except (ValueError, KeyError, TypeError) as error:
            raise EngineError(f"The module's header is damaged ({type(error).__name__}: {error}).") from error
        self.interface, self.schedule, self.report = interface, schedule, report
        self.segments = torch.nn.ModuleList(TorchSegment() if is_torch else TRTModule() for is_torch in header["torch"])
        self.eager = torch.nn.ModuleDict({name: TorchSegment() for name in header["eager"]})
        self._network, self._make_network = None, None
        self.traced = None
        self.growth = Growth(bool(header.get("is_bound")), took=self._took)
        self._forget()

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickle the state dict, which is data."""
        return _loaded, (dict(self.state_dict()),)

    def __deepcopy__(self, memo: dict[int, Any]) -> PartitionedModule:
        """A copy with engines and constants of its own, without the networks."""
        copied = PartitionedModule((), self.schedule, self.interface, copy.deepcopy(self.report, memo))
        copied.segments = copy.deepcopy(self.segments, memo)
        copied.eager = copy.deepcopy(self.eager, memo)
        copied.recomputed, copied.growth = self.recomputed, Growth(self.growth.is_bound, took=copied._took)
        copied.cuda_graph, copied.borrow_outputs = self.cuda_graph, self.borrow_outputs
        memo[id(self)] = copied
        return copied

    def extra_repr(self) -> str:
        refused = self.cuda_graph_refused
        return "\n".join([*self.report.segments, *([f"without CUDA graphs: {refused}"] if refused else [])])


def _loaded(state: dict[str, Any]) -> PartitionedModule:
    module = PartitionedModule()
    module.load_state_dict(state)
    return module


def network_of(module: PartitionedModule) -> PartitionedNetwork:
    """What the segments are lowered to, made of the networks of the engines, which are kept or can be made."""
    assert module.schedule is not None
    parts: list[Any] = [s.networks()[0] if isinstance(s, TRTModule) else s for s in module.segments]
    eager: dict[int, Any] = {int(place): segment for place, segment in module.eager.items()}
    return PartitionedNetwork(
        parts, module.schedule, module._interface(), module.report.assumptions, eager, module.growth
    )
