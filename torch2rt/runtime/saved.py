"""Converted modules as JSON values and named parts, as `torch2rt.save` writes them into a file, and back."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from typing import Any

import torch

from torch2rt.engine.artifact import described
from torch2rt.engine.container import Buffer, Container, read, write
from torch2rt.engine.engine import Engine, to_bytes
from torch2rt.engine.manifest import KIND, engine_of, readable
from torch2rt.engine.source import encode
from torch2rt.errors import EngineError, InputError, Torch2RTError
from torch2rt.network import Network, versions
from torch2rt.runtime.kernel_cache import gpu_key
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.partitioned.segments import PartitionedModule, network_of
from torch2rt.runtime.partitioned.torch_segment import TorchSegment
from torch2rt.runtime.stateful import StatefulModule
from torch2rt.structure import as_bytes, bare_name

Source = tuple[Sequence[Any], Sequence[torch.Tensor], str]  # nodes, tensors and `nan` of a graph
Make = Callable[[Engine, Sequence[Source]], TRTModule]


class Writer:
    """The parts of a module. `source` keeps the graphs of engines, and `kernels` what was compiled for the GPU."""

    def __init__(self, source: bool, kernels: bool) -> None:
        self.source, self.kernels = source, kernels
        self.parts: dict[str, Buffer] = {}
        self.networks: list[Network] = []  # whose graphs were kept

    def add(self, name: str, data: Buffer) -> str:
        """A new part; returns its name."""
        name = f"{len(self.parts)}.{name}"
        self.parts[name] = data
        return name

    def tensor(self, name: str, value: torch.Tensor) -> list[Any]:
        """A tensor as a part, and what is to be known of it."""
        data = memoryview(as_bytes(value).cpu().numpy()) if value.numel() else b""
        return [bare_name(value.dtype), list(value.shape), self.add(name, data)]

    def module(self, module: Any) -> dict[str, Any]:
        """A converted module; raises `InputError` for what is none."""
        if isinstance(module, TRTModule):
            return self._engine(module)
        if isinstance(module, PartitionedModule):
            header = _own_entries(module)["header"]
            segments, eager = (list(map(self.module, parts)) for parts in (module.segments, module.eager.values()))
            return {"kind": "partitioned", "header": json.loads(header), "segments": segments, "eager": eager}
        if isinstance(module, TorchSegment):
            segment = module if module.draws else module.copy()
            if not module.draws:
                segment.move(torch.device("cpu"))  # a machine without this GPU reads it, too
            own = _own_entries(segment)
            return {"kind": "torch", "header": json.loads(own["header"]), "program": self.add("torch", own["program"])}
        if isinstance(module, StatefulModule):
            state = {name: self.tensor(f"state.{name}", value) for name, value in module.state.items()}
            inner = self.module(module.converted)
            objects = [[index, sorted(map(list, paths), key=str)] for index, paths in module.objects.items()]
            kept: dict[str, Any] = {"state": state, "written": module.written, "objects": objects}
            return {"kind": "stateful", "converted": inner, **kept}
        raise InputError(
            f"torch2rt.save takes what torch2rt() returns, not a {type(module).__name__}. Parts of a module that "
            "convert_submodules has converted are saved one by one, or with the module's state dict."
        )

    def _engine(self, module: TRTModule) -> dict[str, Any]:
        engine = module.to_be_saved()
        found: dict[str, Any] = {
            "kind": "engine",
            "engine": described(engine),
            "plan": self.add("engine", engine.data),
            "kernels": {},
            "sources": [self._source(network) for network in self._networks(module)] if self.source else [],
        }
        if self.kernels:
            blobs = {**engine.kernels, **compiled(module)}
            for gpu, of_each in blobs.items():
                found["kernels"][gpu] = [self.add("kernels", blob) for blob in of_each]
        return found

    def _networks(self, module: TRTModule) -> list[Network]:
        networks = []
        with contextlib.suppress(Torch2RTError):
            networks = module.networks()
        if not networks or any(network.lowered is None for network in networks):
            raise EngineError(
                "source=True needs the graph: convert with torch2rt() and keep_network=True; a loaded engine has it "
                "only if it was saved with source=True, and a refitted one has it no more."
            )
        return networks

    def _source(self, network: Network) -> dict[str, Any]:
        assert network.lowered is not None
        if versions(network.lowered) != network.versions:
            raise EngineError(
                "source=True: weights of the module have changed since it was converted, so that the graph is not the "
                "engine's any more. Save the engine before the module is trained on, or convert it again."
            )
        self.networks.append(network)
        nodes, tensors = encode(network.lowered)
        return {"nodes": nodes, "nan": network.nan, "tensors": [self.tensor("weight", x) for x in tensors]}


def write_module(module: Any, path: str | PathLike[str]) -> None:
    """Write a converted module to a file for a process on this machine, with what was compiled of it."""
    writer = Writer(source=False, kernels=True)
    write(path, {"kind": KIND, "module": writer.module(module)}, writer.parts)


def read_module(path: str | PathLike[str]) -> Any:
    """The module in a file of `write_module`."""
    file = read(path)
    with readable(file):
        return Reader(file).module(file.manifest["module"])


def compiled(module: TRTModule) -> dict[str, list[bytes]]:
    """What TensorRT for RTX has compiled of a module's engines, by GPU."""
    found = {}
    for pool in list(module._pools.values()):
        blobs = [one.loaded.kernels.blob() for one in getattr(pool, "pools", [pool])]
        if any(blobs):
            found[gpu_key(pool.device)] = blobs
    return found


def _own_entries(module: Any) -> dict[str, bytes]:
    """What a module itself keeps in a state dict."""
    entries: dict[str, Any] = {}
    module._save_to_state_dict(entries, "", False)
    return {name: to_bytes(value, name) for name, value in entries.items()}


class Reader:
    """The inverse of `Writer`: modules of a file's parts. `make` makes those of engines and what they were built of."""

    def __init__(self, container: Container, make: Make | None = None) -> None:
        self.container, self.make = container, make

    def tensor(self, listed: Any) -> torch.Tensor:
        """A tensor whose memory is the file's; writes to it do not reach the file."""
        name, shape, part = listed
        dtype = getattr(torch, name)
        if not isinstance(dtype, torch.dtype):
            raise EngineError(f"{self.container.name} is damaged: torch.{name} is no dtype.")
        data = self.container.part(part)
        if not len(data):
            return torch.empty(shape, dtype=dtype)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).reshape(shape)

    def sources(self, node: Mapping[str, Any]) -> list[Source]:
        """The graphs of an engine."""
        return [(s["nodes"], list(map(self.tensor, s["tensors"])), s["nan"]) for s in node["sources"]]

    def module(self, node: Mapping[str, Any]) -> Any:
        """The module that was saved; raises `EngineError` for values that make no sense."""
        kind = node["kind"]
        if kind == "engine":
            engine = engine_of(self.container, node)
            return TRTModule(engine) if self.make is None else self.make(engine, self.sources(node))
        if kind == "torch":
            return _filled(TorchSegment(), node["header"], program=self.container.part(node["program"]))
        if kind == "partitioned":
            module = _filled(PartitionedModule(), node["header"])
            names = list(module.eager)
            if len(node["segments"]) != len(module.segments) or len(node["eager"]) != len(names):
                raise EngineError(f"{self.container.name} is damaged: it has other segments than it states.")
            module.segments = torch.nn.ModuleList(map(self.module, node["segments"]))
            module.eager = torch.nn.ModuleDict(dict(zip(names, map(self.module, node["eager"]))))
            if all(engine.has_networks for engine in module.engines):
                module._make_network = network_of
            return module
        if kind == "stateful":
            state = {name: self.tensor(listed).clone() for name, listed in node["state"].items()}
            if torch.cuda.is_available():
                state = {name: value.cuda() for name, value in state.items()}
            objects = {index: set(map(tuple, kept)) for index, kept in node.get("objects", ())}
            return StatefulModule(self.module(node["converted"]), state, node["written"], objects)
        raise EngineError(f"{self.container.name} holds a module of an unknown kind, {kind!r}.")


def _filled(module: Any, header: Any, **parts: Buffer) -> Any:
    """A module filled as from its own entries in a state dict."""
    entries = {name: torch.frombuffer(bytearray(data), dtype=torch.uint8) for name, data in parts.items()}
    text = json.dumps(header).encode()
    entries["header"] = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    module._load_from_state_dict(entries, "", None, True, [], [], [])
    return module
