"""Run: an engine as an `nn.Module` on torch CUDA tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from torch2rt.backend.tensorrt import FLAVOUR, TORCH_DTYPES, trt
from torch2rt.engine import artifact
from torch2rt.engine.engine import Engine, stored, to_tensor
from torch2rt.engine.report import Report
from torch2rt.engine.variant import EngineVariant
from torch2rt.errors import EngineError, InputError, Torch2RTError
from torch2rt.interface import Input, Interface
from torch2rt.network import Network
from torch2rt.runtime.converted import Loaded
from torch2rt.runtime.graph_cache import GraphCache
from torch2rt.runtime.loaded_engine import LoadedEngine, deserialize
from torch2rt.runtime.pool import ContextPool
from torch2rt.runtime.reference_module import ReferenceModule as ReferenceModule
from torch2rt.runtime.refittable import Refittable
from torch2rt.runtime.variants import Dispatch
from torch2rt.structure import unflatten


class TRTModule(Refittable):
    """A TensorRT engine as a module: call it as the module it was made from, with CUDA tensors.

    - `engine`: of `torch2rt.build`. `TRTModule()` is empty, until `load_state_dict` fills it.
    - `network`: the network that it was built from, for `model_trt.network` and `model_trt.reference()`; a list where
      the engine has variants.

    The engine is deserialized at the first use, so that making, saving and loading a module needs no GPU.

    >>> model_trt = torch2rt(model, [x])                    # doctest: +SKIP
    >>> torch.save(model_trt.state_dict(), "model.pth")     # doctest: +SKIP
    >>> again = TRTModule()                                 # doctest: +SKIP
    >>> again.load_state_dict(torch.load("model.pth"))      # doctest: +SKIP

    Attributes: `built` (the `torch2rt.Engine`, `None` while the module is empty) and its `engine_bytes`, `interface`,
    `made_by` and `report` (a `torch2rt.engine.report.Report`: what was verified, what was assumed, what calls need),
    `network` (the TensorRT network if it was kept, else `None`), `engine` and `context` (TensorRT's objects, made when
    first asked for), `device` (the GPU), `cuda_graph` and `borrow_outputs` (see `forward`).
    """

    def __init__(self, engine: Engine | None = None, network: Network | Sequence[Network] | None = None) -> None:
        super().__init__()
        if not (engine is None or isinstance(engine, Engine)):
            raise InputError(
                f"TRTModule takes the Engine that torch2rt.build returns, not a {type(engine).__name__}; "
                "TRTModule.from_engine reads files and bytes."
            )
        self._hold(engine, [network] if isinstance(network, Network) else list(network or []))
        self.cuda_graph: bool | GraphCache = False
        self.borrow_outputs = False
        self._index: int | None = None
        self._is_replica = False
        self._pools: dict[int | None, Any] = {}  # a ContextPool each, or VariantPools
        self._lock = threading.RLock()

    @property
    def interface(self) -> Interface | None:
        """Names, dtypes and ranges of inputs and outputs; `None` while the module is empty."""
        return None if self._built is None else self._built.interface

    @property
    def engine_bytes(self) -> bytes | None:
        """The serialized engine, as TensorRT reads it; `None` while the module is empty."""
        return None if self._built is None else bytes(self.to_be_saved())

    @property
    def made_by(self) -> dict[str, str]:
        """TensorRT's flavour and version, and what the engine was built for."""
        return dict(self._engine().made_by)

    @property
    def report(self) -> Report:
        """What was verified, what was assumed, and what calls need."""
        return self._engine().report

    def _engine(self) -> Engine:
        """The engine, whose report says what is known by now; raises `EngineError` while there is none."""
        if (engine := self._built) is None:
            raise EngineError(
                "This TRTModule holds no engine yet: load one with load_state_dict or TRTModule.from_engine."
            )
        engine.report.without_cuda_graphs = self.cuda_graph_refused
        return engine

    def _interface(self) -> Interface:
        return self._engine().interface

    def _parts(self) -> Sequence[Interface]:
        return [variant.interface for variant in self._engine().variants] or [self._interface()]

    def _make_contexts(self, count: int) -> None:
        pool = self._ready()
        for each in getattr(pool, "pools", [pool]):
            each.make_contexts(count)

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine in the order of the caller's current CUDA stream, without waiting for it.

        It may be called from any number of threads and streams at once. With `cuda_graph` set, calls whose shapes come
        back are captured for their stream and shapes, and replayed (`torch2rt.GraphCache` says when, and how many
        graphs are kept); with `borrow_outputs` too, the outputs of a replay are the graph's own, overwritten by the
        next call on the same stream with the same shapes. A `torch.cuda.ExternalStream`
        may be gone before its graphs, so calls on one are not captured. Some engines cannot be captured, such as those
        of recurrent layers over a dynamic length. Their calls run plainly, and `print(model_trt)` and
        `cuda_graph_refused` say why.

        A capture is CUDA's own and leaves torch's state alone, so that other threads may draw random numbers and
        allocate meanwhile. But CUDA lets no thread wait for the whole device (`torch.cuda.synchronize()`) then.

        Raises `InputError` for tensors that do not fit (number, dtype, rank, device, layout, a size outside its range)
        and `EngineError` where the engine cannot run here.
        """
        if self._follow is not None:
            self._follow()
        if self.recomputed is not None and (result := self.recomputed(self, args, kwargs)) is not NotImplemented:
            return result
        pool = self._pools.get(self._index) or self._ready(args, kwargs)
        interface = pool.interface  # not self.interface, which load_state_dict may be changing
        tensors: Any = args
        if kwargs or len(args) != interface.plain_inputs:
            tensors = interface.tensors(args, kwargs)
        outputs = pool.run(tensors, self.cuda_graph, self.borrow_outputs)
        if interface.plain_result is torch.Tensor:
            return outputs[0]
        if interface.plain_result is tuple:
            return tuple(outputs)
        return interface.wrap(outputs, [tuple(t.shape) for t in tensors])

    def _ready(self, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None) -> Any:
        """The contexts on this module's GPU: the one it was put on, or else that of the first call's inputs."""
        with self._lock:
            interface = self._interface()
            index = self._index
            if index is None and args is not None:
                tensors = interface.tensors(args, kwargs or {})
                index = next((t.get_device() for t in tensors if t.is_cuda), None)
            pool = self._pool(index)
            if not self._is_replica:
                self._index = pool.index
            return pool

    def _pool(self, index: int | None) -> Any:
        """The contexts on a GPU, on the current one if not given, where the engine is loaded if need be."""
        with self._lock:
            if index is None or (pool := self._pools.get(index)) is None:
                pool = self._load(index)
                self._pools[pool.index] = pool
            return pool

    @property
    def device(self) -> torch.device | None:
        """The GPU that the engine runs on; `None` before its first use, or before `.to("cuda:1")`, decides."""
        return None if self._index is None else torch.device("cuda", self._index)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow `.to`, `.cuda` and `.cpu`: on another GPU, the engine is deserialized at its first use there."""
        where = fn(torch.empty(0, device=self.device or "cpu")).device
        with self._lock:
            index = where.index if where.type == "cuda" else None
            if index != self._index:
                self._pools = {}
            self._index = index
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica runs on the GPU of its inputs; all of them share one engine for each GPU."""
        if self._follow is not None:
            self._follow()  # once, and not by each replica
        replica = super()._replicate_for_data_parallel()
        replica._index, replica._is_replica, replica._follow = None, True, None
        return replica

    def load(self, device: torch.device) -> Loaded:
        """Load the engine on a GPU, for calls with tensors from there; `model_trt.device` stays as it is."""
        return self._pool(torch.cuda.current_device() if device.index is None else device.index)

    def contexts(self, tensors: Sequence[torch.Tensor]) -> ContextPool:
        """The execution contexts of the engine that takes these tensors, on their GPU."""
        pool = self._pools.get(self._index) or self._ready(*unflatten(self._interface().arguments, list(tensors)))
        found: ContextPool = pool if isinstance(pool, ContextPool) else pool.of(tensors)
        return found

    @property
    def cuda_graph_refused(self) -> str | None:
        """Why calls run without CUDA graphs although `cuda_graph` is set; `None` if they do not."""
        reasons = [pool.uncapturable for pool in list(self._pools.values())] if self.cuda_graph else []
        return next(filter(None, reasons), None)

    @property
    def engine(self) -> Any:
        """The `ICudaEngine`; raises `EngineError` where there are several."""
        return self._ready().loaded.engine

    @property
    def context(self) -> Any:
        """An `IExecutionContext` of the engine for uses of your own; calls of the module have others."""
        return self._ready().context

    @property
    def network(self) -> Any:
        """The `INetworkDefinition` the engine was built from, if it was kept; a list where there are several."""
        definitions = [network.definition for network in self._current()]
        return definitions if len(definitions) > 1 else next(iter(definitions), None)

    def reference(self) -> ReferenceModule:
        """The kept network, evaluated with torch on whatever device the inputs are on: the engine's oracle."""
        owner = None if self._follow is None else self
        live, follow = self._live, self._follow
        reference = ReferenceModule(*self.networks(), interface=self.interface, live=live, follow=follow, owner=owner)
        reference.recomputed = self.recomputed
        return reference

    def networks(self) -> list[Network]:
        """The kept networks, one for each engine; made of the graphs in the file, where they were saved with it."""
        if not (networks := self._current()):
            raise Torch2RTError(
                "reference() needs the network: convert with keep_network=True; a loaded engine has none, unless "
                "torch2rt.save(..., source=True) has kept its graph."
            )
        return networks

    def variant_for(self, shapes: Any) -> EngineVariant:
        """The engine that serves inputs of these shapes, as `model_trt.report` lists it.

        `shapes`: one for each input, in a list (flat, or nested like the inputs) or a dict by input name. Raises
        `InputError` for shapes that none serves.

        >>> model_trt.variant_for([(2, 3)]).region          # doctest: +SKIP
        'x.shape[0] % 2 == 0'
        """
        engine = self._engine()
        given = engine.interface.shapes(shapes)
        if engine.variants:
            return engine.variants[Dispatch(engine.interface, [v.interface for v in engine.variants]).find(given)]
        engine.interface.check(given, [spec.dtype for spec in engine.interface.inputs])
        return EngineVariant(0, engine.interface, "every size of the range", "", (), len(engine.data))

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        engine = self.to_be_saved()
        destination[prefix + "engine"] = to_tensor(engine.data)
        destination[prefix + "header"] = to_tensor(artifact.header(engine, artifact.digest(engine.data)))

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
        if (kept := stored(state_dict, prefix, ("engine", "header"), missing_keys, unexpected_keys)) is not None:
            engine = artifact.parse(*kept)
            if not self.follows:  # else its module says what the weights are, also where both are loaded together
                self.take(engine)

    def take(self, engine: Engine, *networks: Network) -> None:
        """Hold another engine and what it was built of, in place of what was there; calls under way end with that."""
        with self._lock:
            self._hold(engine, networks)
            self._pools = {}

    def save_engine(self, path: str | PathLike[str]) -> None:
        """Write engine and calling convention to one file, for `TRTModule.from_engine`."""
        artifact.save(path, self.to_be_saved())

    @classmethod
    def from_engine(cls, source: artifact.Source) -> TRTModule:
        """A module from a file of `save_engine`, from its bytes, or from a plain serialized engine.

        TensorRT itself can read the file too: the calling convention stands after the engine. A plain engine's inputs
        and outputs are taken from the engine, in its order, which needs a GPU; several outputs become a tuple.

        Raises `EngineError` for a file that is damaged, and for one that is something else, which it names.
        """
        data, header = artifact.load(source)
        module = cls()
        if header is not None:
            module.take(artifact.parse(data, header))
            return module
        made_by = {"flavour": FLAVOUR, "version": "unknown"}
        try:
            deserialized = deserialize(data, made_by)
        except EngineError as error:
            raise EngineError(
                f"{artifact.doubt(data)}A plain engine, without the calling convention that save_engine writes "
                f"after it, is asked for its inputs on a GPU. {error}"
            ) from error
        engine = Engine(data, _interface_of(deserialized.engine), made_by)
        pool = ContextPool(LoadedEngine(engine, deserialized=deserialized))
        module._built, module._index, module._pools = engine, pool.index, {pool.index: pool}
        return module

    def __getstate__(self) -> dict[str, Any]:
        """What a copy takes over."""
        now = {"_built": None if self._built is None else self.to_be_saved(), "_is_stale": False}
        without: dict[str, Any] = {
            "_live": None,
            "_follow": None,
            "_pools": {},
            "_kept": [],
            "_later": None,
            "_lock": None,
        }
        return {**self.__dict__, **now, **without}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()

    def __copy__(self) -> TRTModule:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self.__getstate__())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TRTModule:
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def extra_repr(self) -> str:
        if self._built is None:
            return "empty"
        plain = f"; without CUDA graphs: {self.cuda_graph_refused}" if self.cuda_graph_refused else ""
        return f"{self._built.describe()}{plain}"


def _interface_of(engine: Any) -> Interface:
    """The calling convention of an engine that says nothing about one: tensors in and out, in its order."""
    inputs, outputs = [], []
    for index in range(engine.num_io_tensors):
        name = engine.get_tensor_name(index)
        if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
            shapes = [tuple(s) for s in engine.get_tensor_profile_shape(name, 0)]
            inputs.append(Input(name, TORCH_DTYPES[engine.get_tensor_dtype(name)], *shapes))
        else:
            outputs.append(name)
    leaves = [{"leaf": i} for i in range(len(outputs))]
    arguments = {"tuple": [{"tuple": [{"leaf": i} for i in range(len(inputs))]}, {"dict": [], "items": []}]}
    result = leaves[0] if len(leaves) == 1 else {"tuple": leaves}
    return Interface(inputs, arguments, [], outputs, result, [{"output": i} for i in range(len(outputs))])
