"""Run: an engine as an `nn.Module` on torch CUDA tensors."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from torch2rt.backend.tensorrt import FLAVOUR, LOG, TORCH_DTYPES, VERSION, trt
from torch2rt.engine import artifact
from torch2rt.engine.report import Report
from torch2rt.errors import EngineError, Torch2RTError
from torch2rt.interface import Input, Interface
from torch2rt.network import Network
from torch2rt.reference.evaluator import Evaluator
from torch2rt.runtime.runtime import Runtime


class _Converted(torch.nn.Module):
    """What an engine and its reference have in common: the calling convention."""

    interface: Interface | None

    @property
    def input_names(self) -> list[str]:
        """The engine's inputs, in the order of the tensors in a call."""
        return [spec.name for spec in self._interface().inputs]

    @property
    def output_names(self) -> list[str]:
        """The engine's outputs."""
        return list(self._interface().outputs)

    def _interface(self) -> Interface:
        if self.interface is None:
            raise EngineError(
                "This TRTModule holds no engine yet: load one with load_state_dict or TRTModule.from_engine."
            )
        return self.interface


class TRTModule(_Converted):
    """A TensorRT engine as a module: call it as the module it was made from, with CUDA tensors.

    `TRTModule()` is empty; `load_state_dict` fills it. The engine is deserialized at the first use, so that making,
    saving and loading one needs no GPU.

    >>> model_trt = torch2rt(model, [x])                    # doctest: +SKIP
    >>> torch.save(model_trt.state_dict(), "model.pth")     # doctest: +SKIP
    >>> again = TRTModule()                                 # doctest: +SKIP
    >>> again.load_state_dict(torch.load("model.pth"))      # doctest: +SKIP

    Attributes: `engine_bytes` (the serialized engine), `network` (the TensorRT network if it was kept, else `None`),
    `interface` (names, dtypes and ranges), `report` (a `torch2rt.engine.report.Report`: what was verified, what was
    assumed, what calls need), `engine` and `context` (TensorRT's objects, made when first asked for),
    `device` (the GPU), `cuda_graph` and `borrow_outputs` (see `forward`).
    """

    def __init__(
        self,
        engine_bytes: bytes | None = None,
        interface: Interface | None = None,
        network: Network | None = None,
        made_by: Mapping[str, str] | None = None,
        report: Report | None = None,
    ) -> None:
        super().__init__()
        self.engine_bytes = engine_bytes
        self.interface = interface
        self._network = network
        self._made_by = dict(made_by or {"flavour": FLAVOUR, "version": VERSION})
        self._report = report or _unverified(interface, network)
        self._facts = network.facts() if network is not None else {}
        self.cuda_graph = False
        self.borrow_outputs = False
        self._index: int | None = None
        self._is_replica = False
        self._runtimes: dict[int | None, Runtime] = {}
        self._lock = threading.RLock()

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine in the order of the caller's current CUDA stream, without waiting for it.

        It may be called from any number of threads and streams at once. With `cuda_graph` set, the call is captured
        once for each stream and shapes, and replayed; with `borrow_outputs` too, the outputs of a replay are the
        graph's own, overwritten by the next call on the same stream with the same shapes. A `torch.cuda.ExternalStream`
        may be gone before its graphs, so calls on one are not captured. Some engines cannot be captured, such as those
        of recurrent layers over a dynamic length. Their calls run plainly, and `print(model_trt)` and
        `cuda_graph_refused` say why.

        A capture is CUDA's own and leaves torch's state alone, so that other threads may draw random numbers and
        allocate meanwhile. But CUDA lets no thread wait for the whole device (`torch.cuda.synchronize()`) then.

        Raises `InputError` for tensors that do not fit (number, dtype, rank, device, layout, a size outside its range)
        and `EngineError` where the engine cannot run here.
        """
        runtime = self._runtimes.get(self._index) or self._ready(args, kwargs)
        interface = runtime.interface  # not self.interface, which load_state_dict may be changing
        tensors: Any = args
        if kwargs or len(args) != interface.plain_inputs:
            tensors = interface.tensors(args, kwargs)
        outputs = runtime.run(tensors, self.cuda_graph, self.borrow_outputs)
        if interface.plain_result is torch.Tensor:
            return outputs[0]
        if interface.plain_result is tuple:
            return tuple(outputs)
        return interface.wrap(outputs, [tuple(t.shape) for t in tensors])

    def _ready(self, args: tuple[Any, ...] | None = None, kwargs: Mapping[str, Any] | None = None) -> Runtime:
        """The runtime on this module's GPU: the one it was put on, or else that of the first call's inputs."""
        with self._lock:
            interface = self._interface()
            index = self._index
            if index is None and args is not None:
                tensors = interface.tensors(args, kwargs or {})
                index = next((t.get_device() for t in tensors if t.is_cuda), None)
            if index is None or (runtime := self._runtimes.get(index)) is None:
                runtime = Runtime(self.engine_bytes or b"", self._made_by, interface, index)
                self._runtimes[runtime.index] = runtime
            if not self._is_replica:
                self._index = runtime.index
            return runtime

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
                self._runtimes = {}
            self._index = index
        return super()._apply(fn, recurse)

    def _replicate_for_data_parallel(self) -> Any:
        """A replica runs on the GPU of its inputs; all of them share one engine for each GPU."""
        replica = super()._replicate_for_data_parallel()
        replica._index, replica._is_replica = None, True
        return replica

    def load(self, device: torch.device) -> Runtime:
        """Make the engine ready on a GPU, for calls with tensors from there. The module is put nowhere by it."""
        with self._lock:
            index = torch.cuda.current_device() if device.index is None else device.index
            if (runtime := self._runtimes.get(index)) is None:
                runtime = self._runtimes[index] = Runtime(
                    self.engine_bytes or b"", self._made_by, self._interface(), index
                )
            return runtime

    @property
    def made_by(self) -> dict[str, str]:
        """TensorRT's flavour and version, and what the engine was built for."""
        return dict(self._made_by)

    @property
    def cuda_graph_refused(self) -> str | None:
        """Why calls run plainly although `cuda_graph` is set; `None` if they do not, or before the first of them."""
        reasons = [runtime.uncapturable for runtime in list(self._runtimes.values())] if self.cuda_graph else []
        return next(filter(None, reasons), None)

    @property
    def report(self) -> Report:
        """What was verified, what was assumed, and what calls need."""
        self._report.without_cuda_graphs = self.cuda_graph_refused
        return self._report

    @property
    def engine(self) -> Any:
        """The `ICudaEngine`."""
        return self._ready().engine

    @property
    def context(self) -> Any:
        """An `IExecutionContext` of the engine for uses of your own; calls of the module have others."""
        return self._ready().context

    @property
    def network(self) -> Any:
        """The `INetworkDefinition` the engine was built from, if it was kept."""
        return None if self._network is None else self._network.definition

    def drop_network(self) -> None:
        """Let go of the network, and of the weights that it holds; `reference()` needs it."""
        self._network = None

    def reference(self) -> ReferenceModule:
        """The kept network, evaluated with torch on whatever device the inputs are on: the engine's oracle."""
        if self._network is None:
            raise Torch2RTError(
                "reference() needs the network: convert with keep_network=True; a loaded engine has none."
            )
        return ReferenceModule(self._network)

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._interface()
        assert self.engine_bytes is not None
        destination[prefix + "engine"] = _to_tensor(self.engine_bytes)
        destination[prefix + "header"] = _to_tensor(self._header(artifact.digest(self.engine_bytes)))

    def _header(self, digest: str) -> bytes:
        """All but the engine, as JSON."""
        return artifact.Saved(self._interface(), self._made_by, self.report, self._facts).text(digest)

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        keys = {name: prefix + name for name in ("engine", "header")}
        missing = [key for key in keys.values() if key not in state_dict]
        missing_keys.extend(missing)
        unexpected_keys.extend(k for k in state_dict if k.startswith(prefix) and k not in keys.values())
        if not missing:
            self._set(*(_to_bytes(state_dict[keys[name]], keys[name]) for name in ("engine", "header")))

    def _set(self, engine: bytes, header: bytes) -> None:
        """Take a saved engine, or leave everything as it was and raise `EngineError`."""
        saved = artifact.parse(engine, header)
        with self._lock:
            self.engine_bytes, self.interface, self._made_by = engine, saved.interface, saved.made_by
            self._report, self._facts = saved.report, saved.facts
            self._network, self._runtimes = None, {}

    def save_engine(self, path: str | PathLike[str]) -> None:
        """Write engine and calling convention to one file, for `TRTModule.from_engine`."""
        self._interface()
        assert self.engine_bytes is not None
        artifact.save(path, self.engine_bytes, self._header)

    @classmethod
    def from_engine(cls, source: artifact.Source) -> TRTModule:
        """A module from a file of `save_engine`, from its bytes, or from a plain serialized engine.

        TensorRT itself can read the file too: the calling convention stands after the engine. A plain engine's inputs
        and outputs are taken from the engine, in its order, which needs a GPU; several outputs become a tuple.

        Raises `EngineError` for a file that is damaged, and for one that is something else, which it names.
        """
        engine, header = artifact.load(source)
        module = cls()
        if header is not None:
            module._set(engine, header)
            return module
        made_by = {"flavour": FLAVOUR, "version": "unknown"}
        try:
            runtime = Runtime(engine, made_by)
        except EngineError as error:
            raise EngineError(
                f"{artifact.doubts(engine)}A plain engine, without the calling convention that save_engine writes "
                f"after it, is asked for its inputs on a GPU. {error}"
            ) from error
        module.engine_bytes, module.interface, module._made_by = engine, _interface_of(runtime.engine), made_by
        runtime.serve(module.interface)
        module._index, module._runtimes = runtime.index, {runtime.index: runtime}
        return module

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        if self.engine_bytes is not None:  # torch.save writes tensors as they are, and bytes as text of twice the size
            state["engine_bytes"] = _to_tensor(self.engine_bytes)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self.engine_bytes, torch.Tensor):
            self.engine_bytes = _to_bytes(self.engine_bytes, "engine_bytes")
        self._lock = threading.RLock()

    def _state(self) -> dict[str, Any]:
        """What a copy takes over."""
        return {**self.__dict__, "_runtimes": {}, "_network": None, "_lock": None}

    def __copy__(self) -> TRTModule:
        copied = type(self).__new__(type(self))
        copied.__setstate__(self._state())
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> TRTModule:
        memo[id(self)] = copied = type(self).__new__(type(self))
        copied.__setstate__(copy.deepcopy(self._state(), memo))  # bytes never change, and are shared
        return copied

    def extra_repr(self) -> str:
        if self.interface is None:
            return "empty"
        inputs = ", ".join(f"{i.name}: {i.describe()}" for i in self.interface.inputs)
        needs = "".join(f"; needs {text}" for _, text in self.interface.constraints)
        size = f"{len(self.engine_bytes or b'') / 2**20:.1f} MiB"
        plain = f"; without CUDA graphs: {self.cuda_graph_refused}" if self.cuda_graph_refused else ""
        return f"{inputs} -> {', '.join(self.interface.outputs)}{needs}; {size}{plain}"


class ReferenceModule(_Converted):
    """A network evaluated with torch, layer by layer, under the converted module's calling convention."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.interface = network.interface
        with LOG.capture():  # TensorRT complains when asked for attributes that a dynamic layer does not have
            self._evaluator = Evaluator(network.definition, network.weights_by_layer())
        self._network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on the device of the inputs; raises `InputError` for what the engine would refuse."""
        interface = self._interface()
        tensors = interface.tensors(args, kwargs)
        return interface.wrap(self.outputs(tensors), [tuple(t.shape) for t in tensors])

    def outputs(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The engine's outputs for its inputs, each in the order of the interface."""
        interface = self._interface()
        interface.check([tuple(t.shape) for t in tensors], [t.dtype for t in tensors])
        with torch.no_grad():
            given = {spec.name: x.permute(spec.axes) for spec, x in zip(interface.inputs, tensors, strict=True)}
            outputs = self._evaluator(given)
        return [outputs[name] for name in interface.outputs]


def _unverified(interface: Interface | None, network: Network | None) -> Report:
    """What is known of a conversion that has not been compared with its module."""
    needs = [text for _, text in interface.constraints] if interface else []
    return Report(assumptions=list(network.assumptions) if network else [], needs=needs)


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


def _to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _to_bytes(value: Any, name: str) -> bytes:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise EngineError(f"'{name}' of the state dict is not a 1-d uint8 tensor.")
    return value.cpu().numpy().tobytes()
