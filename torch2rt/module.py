"""Run: an engine as an `nn.Module` on torch CUDA tensors."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from torch2rt.backend import FLAVOUR, LOG, TORCH_DTYPES, VERSION, create_execution_context, trt
from torch2rt.errors import EngineError, InputError, Torch2RTError
from torch2rt.interface import Input, Interface
from torch2rt.lowering import Network
from torch2rt.reference import Evaluator

FORMAT = 1
MAGIC = b"torch2rt"


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
    `interface` (names, dtypes and ranges), `engine` and `context` (TensorRT's objects, made when first asked for).
    """

    def __init__(
        self,
        engine_bytes: bytes | None = None,
        interface: Interface | None = None,
        network: Network | None = None,
        made_by: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.engine_bytes = engine_bytes
        self.interface = interface
        self._network = network
        self._made_by = dict(made_by or {"flavour": FLAVOUR, "version": VERSION})
        self._runtime: _Runtime | None = None
        self._lock = threading.Lock()

    # Calls -----------------------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine in the order of the caller's current CUDA stream, without waiting for it.

        Raises `InputError` for tensors that do not fit (number, dtype, rank, device, a size outside its range) and
        `EngineError` where the engine cannot run here.
        """
        interface = self._interface()
        tensors = interface.tensors(args, kwargs)
        shapes = [tuple(t.shape) for t in tensors]
        interface.check(shapes, [t.dtype for t in tensors])
        outputs = self._ready()(tensors, interface)
        return interface.wrap(outputs, shapes)

    def _ready(self) -> _Runtime:
        if self._runtime is None:
            with self._lock:
                if self._runtime is None:
                    self._interface()
                    self._runtime = _Runtime(self.engine_bytes or b"", self._made_by)
        return self._runtime

    @property
    def engine(self) -> Any:
        """The `ICudaEngine`."""
        return self._ready().engine

    @property
    def context(self) -> Any:
        """The `IExecutionContext`."""
        return self._ready().context

    @property
    def network(self) -> Any:
        """The `INetworkDefinition` the engine was built from, if it was kept."""
        return None if self._network is None else self._network.definition

    def reference(self) -> ReferenceModule:
        """The kept network, evaluated with torch on whatever device the inputs are on: the engine's oracle."""
        if self._network is None:
            raise Torch2RTError(
                "reference() needs the network: convert with keep_network=True; a loaded engine has none."
            )
        return ReferenceModule(self._network)

    # Saving and loading ----------------------------------------------------------------------------------------------

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        interface = self._interface()
        assert self.engine_bytes is not None
        header = {
            "format": FORMAT,
            "engine": self._made_by,
            "interface": interface.to_json(),
            "digest": _digest(self.engine_bytes),
        }
        destination[prefix + "engine"] = _to_tensor(self.engine_bytes)
        destination[prefix + "header"] = _to_tensor(json.dumps(header).encode())

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
        try:
            data = json.loads(header)
            if data["format"] != FORMAT:
                raise EngineError(f"The engine was saved in format {data['format']}, this torch2rt reads {FORMAT}.")
            interface = Interface.from_json(data["interface"])
            made_by, digest = dict(data["engine"]), data["digest"]
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"The engine's header is damaged ({type(error).__name__}: {error}).") from error
        if _digest(engine) != digest:
            raise EngineError(
                f"The engine is truncated or damaged: its {len(engine)} bytes do not have the digest {digest}."
            )
        self.engine_bytes, self.interface, self._made_by = engine, interface, made_by
        self._network, self._runtime = None, None

    def save_engine(self, path: str | os.PathLike[str]) -> None:
        """Write engine and calling convention to one file, for `TRTModule.from_engine`."""
        state = self.state_dict()
        header, engine = (_to_bytes(state[k], k) for k in ("header", "engine"))
        target = Path(path)
        partial = target.with_name(target.name + ".partial")
        partial.write_bytes(engine + header + len(header).to_bytes(8, "little") + MAGIC)
        os.replace(partial, target)

    @classmethod
    def from_engine(cls, source: str | os.PathLike[str] | bytes) -> TRTModule:
        """A module from a file of `save_engine`, from its bytes, or from a plain serialized engine.

        TensorRT itself can read the file too: the calling convention stands after the engine. A plain engine's inputs
        and outputs are taken from the engine, in its order, which needs a GPU; several outputs become a tuple.
        """
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        module = cls()
        if data.endswith(MAGIC):
            end = len(data) - len(MAGIC) - 8
            size = int.from_bytes(data[end : end + 8], "little") if end >= 0 else -1
            if not 0 <= size <= end:
                raise EngineError("The engine file is damaged: its header has no sensible length.")
            module._set(data[: end - size], data[end - size : end])
            return module
        made_by = {"flavour": FLAVOUR, "version": "unknown"}
        runtime = _Runtime(data, made_by)
        module.engine_bytes, module.interface, module._made_by = data, _interface_of(runtime.engine), made_by
        module._runtime = runtime
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runtime": None, "_network": None, "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def extra_repr(self) -> str:
        if self.interface is None:
            return "empty"
        inputs = ", ".join(f"{i.name}: {i.describe()}" for i in self.interface.inputs)
        return f"{inputs} -> {', '.join(self.interface.outputs)}; {len(self.engine_bytes or b'') / 2**20:.1f} MiB"


class ReferenceModule(_Converted):
    """A network evaluated with torch, layer by layer, under the converted module's calling convention."""

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.interface = network.interface
        with LOG.capture():  # TensorRT complains when asked for attributes that a dynamic layer does not have
            self._evaluator = Evaluator(network.definition, network.weights)
        self._network = network

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Evaluate on the device of the inputs; raises `InputError` for what the engine would refuse."""
        interface = self._interface()
        tensors = interface.tensors(args, kwargs)
        shapes = [tuple(t.shape) for t in tensors]
        interface.check(shapes, [t.dtype for t in tensors])
        with torch.no_grad():
            outputs = self._evaluator(dict(zip(self.input_names, tensors, strict=True)))
        return interface.wrap([outputs[name] for name in interface.outputs], shapes)


class _Runtime:
    """A deserialized engine and one execution context, on one GPU.

    The context works on one call at a time: calls are queued on the GPU behind each other, also across streams.
    """

    def __init__(self, engine_bytes: bytes, made_by: Mapping[str, str]) -> None:
        if not torch.cuda.is_available():
            raise EngineError(
                "Running an engine needs an NVIDIA GPU and torch sees none (torch.cuda.is_available() is False). "
                "Without one, model_trt.reference() evaluates the same network with torch."
            )
        if made_by["flavour"] != FLAVOUR or made_by["version"] not in (VERSION, "unknown"):
            raise EngineError(
                f"The engine was built by {made_by['flavour']} {made_by['version']}, this is {FLAVOUR} {VERSION}. "
                "Engines do not cross versions: convert the model again, or install that version."
            )
        self.device = torch.device("cuda", torch.cuda.current_device())
        with LOG.capture() as log:
            self.runtime = trt.Runtime(LOG)
            self.engine = self.runtime.deserialize_cuda_engine(engine_bytes)
            self.context: Any = None
            if self.engine is not None:
                self.context = create_execution_context(self.engine, torch.cuda.get_device_capability(self.device))
        if self.context is None:
            name, capability = torch.cuda.get_device_name(self.device), torch.cuda.get_device_capability(self.device)
            target = made_by.get("target", "an unknown GPU")
            raise EngineError(
                f"The engine was built for {target}; {FLAVOUR} {VERSION} cannot use it "
                f"on {name} (compute capability {'.'.join(map(str, capability))}): "
                + ("; ".join(log) or "it gave no reason.")
            )
        self.lock = threading.Lock()
        self.stream = torch.cuda.Stream(self.device)
        self.done = torch.cuda.Event()
        self.last_stream: torch.cuda.Stream | None = None

    def __call__(self, tensors: list[torch.Tensor], interface: Interface) -> list[torch.Tensor]:
        for spec, tensor in zip(interface.inputs, tensors, strict=True):
            if tensor.device != self.device:
                raise InputError(f"Input '{spec.name}' is on {tensor.device}, the engine on {self.device}.")
        context = self.context
        with self.lock, torch.cuda.device(self.device):
            caller = torch.cuda.current_stream()
            # TensorRT synchronizes the device on the default stream, so calls from there run on a stream of our own.
            stream = self.stream if caller == torch.cuda.default_stream() else caller
            held = [t.detach().contiguous() for t in tensors]
            held = [t if t.data_ptr() % 256 == 0 else t.clone() for t in held]
            for spec, tensor in zip(interface.inputs, held, strict=True):
                if not context.set_input_shape(spec.name, tuple(tensor.shape)):
                    raise InputError(f"TensorRT refuses the shape {tuple(tensor.shape)} of input '{spec.name}'.")
                context.set_tensor_address(spec.name, _address(tensor))
            outputs = []
            for name in interface.outputs:
                dtype = TORCH_DTYPES[self.engine.get_tensor_dtype(name)]
                output = torch.empty(tuple(context.get_tensor_shape(name)), dtype=dtype, device=self.device)
                context.set_tensor_address(name, _address(output))
                outputs.append(output)
            if stream is not caller:
                stream.wait_stream(caller)
            if self.last_stream is not None and self.last_stream != stream:
                stream.wait_event(self.done)
            with LOG.capture() as log:
                ok = context.execute_async_v3(stream.cuda_stream)
            if not ok:
                raise EngineError("TensorRT could not run the engine: " + "; ".join(log))
            self.done.record(stream)
            self.last_stream = stream
            if stream is not caller:
                caller.wait_stream(stream)
                for tensor in (*held, *outputs):
                    tensor.record_stream(stream)
        return outputs


def _address(tensor: torch.Tensor) -> int:
    """A tensor's address; TensorRT refuses null, which is what an empty tensor has."""
    return tensor.data_ptr() or _placeholder(tensor.device).data_ptr()


_PLACEHOLDERS: dict[torch.device, torch.Tensor] = {}


def _placeholder(device: torch.device) -> torch.Tensor:
    return _PLACEHOLDERS.setdefault(device, torch.empty(256, dtype=torch.uint8, device=device))


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


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _to_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _to_bytes(value: Any, name: str) -> bytes:
    if not isinstance(value, torch.Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise EngineError(f"'{name}' of the state dict is not a 1-d uint8 tensor.")
    return value.cpu().numpy().tobytes()
