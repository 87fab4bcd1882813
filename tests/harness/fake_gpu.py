"""A GPU for the runtime's tests without one: contexts compute on the CPU at the addresses that they were told.

A context doubles its inputs, and fills its scratch memory with rubbish first: a call whose memory overlaps another's
gives wrong numbers. Work is done at once, but for that of a capture, which is done at each replay: also that of torch
(`Recorder`), whose results are rubbish until then.
"""

import collections
import contextlib
import ctypes
import threading
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torch2rt.backend import cuda
from torch2rt.interface import Input, Interface
from torch2rt.runtime import (
    cuda_graph,
    execution,
    fits,
    graph_cache,
    graph_memory,
    idle_contexts,
    inputs,
    loaded_engine,
    pool,
)
from torch2rt.runtime.partitioned import graphed
from torch2rt.runtime.shared_lock import SharedLock

SIDE, OTHER, CAPTURE, OWN = 7, 8, 4, 3  # streams


class Context:
    """An execution context; `told` is all that it was told, `refuses` the shapes that it does not take."""

    def __init__(self, gpu, interface):
        self.gpu, self.told, self.shapes, self.addresses = gpu, [], {}, {}
        self.outputs = dict(zip((spec.name for spec in interface.inputs), interface.outputs, strict=True))
        self.inputs = {output: name for name, output in self.outputs.items()}
        self.scratch, self.memory, self.profile, self.refuses, self.runs = gpu.scratch, None, None, [], 0
        self.asked_for = None  # the shapes for which it was asked how much memory they need

    def set_input_shape(self, name, shape):
        self.told.append((name, shape))
        self.shapes[name] = shape
        return shape not in self.refuses

    def set_optimization_profile_async(self, profile, stream):
        self.told.append(("profile", profile))
        self.profile, self.shapes = profile, {}
        return True

    def update_device_memory_size_for_shapes(self):
        self.told.append("memory")
        self.scratch, self.asked_for = 4 * max(shape[0] for shape in self.shapes.values()), dict(self.shapes)
        return self.scratch

    def set_device_memory(self, address, size):
        assert size >= self.scratch and address % 512 == 0
        self.memory = address, size

    def get_tensor_shape(self, name):
        self.told.append(("asked", name))
        return self.shapes[self.inputs[name]]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        if self.gpu.fails:
            raise self.gpu.fails.pop()
        assert self.asked_for in (None, self.shapes), "as TensorRT would, it works beyond the memory it has"
        self.runs += 1
        shapes, addresses, memory, scratch = dict(self.shapes), dict(self.addresses), self.memory, self.scratch

        def work():
            read = {
                name: ctypes.string_at(addresses[name], 4 * torch.Size(shape).numel()) for name, shape in shapes.items()
            }
            if scratch:
                ctypes.memset(memory[0], 0xFF, scratch)
            for name, data in read.items():
                doubled = torch.frombuffer(bytearray(data), dtype=torch.float32) * 2
                ctypes.memmove(addresses[self.outputs[name]], doubled.numpy().tobytes(), len(data))

        self.gpu.do(stream, work)
        return True


class Captured:
    """In the place of `CapturedGraph`."""

    def __init__(self, gpu, stream):
        self.gpu, self.stream, self.works, self.found = gpu, stream, [], {}

    def __enter__(self):
        self.gpu.captures[self.stream] = self.works
        self.gpu.captured += 1
        return self

    def __exit__(self, *_):
        del self.gpu.captures[self.stream]

    def copy(self, target, source, size):
        copy = self.found[target, source] = Copy(target, source, size)
        self.works.append(copy.do)

    def copies(self):
        return self.found

    def replay_on(self, stream):
        def replay():
            with self.gpu.streams[stream]:
                self.gpu.replayed += 1
                for work in self.works:
                    work()
            return 0

        return replay


class CapturedTorch(Captured):
    """One that records the calls of torch, too."""

    def __enter__(self):
        self.gpu.current.capturing, self.gpu.current.works = True, self.works
        self.recorder = Recorder(self.works)
        self.recorder.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.recorder.__exit__(*error)
        self.gpu.current.capturing, self.gpu.current.works = False, None
        if self.gpu.breaks and error[0] is None:
            self.gpu.breaks -= 1
            raise cuda.CaptureError("CUDA cannot capture a graph: error 901")


class Recorder(TorchDispatchMode):
    """Records the operators of torch as works; those that wait for the GPU fail, as they do in a capture."""

    WAIT = ("_local_scalar_dense", "nonzero", "linalg", "_linalg", "_unique", "masked_select", "_to_cpu")

    def __init__(self, works):
        super().__init__()
        self.works = works

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.name().partition("::")[2].startswith(self.WAIT):
            raise RuntimeError("operation not permitted when stream is capturing\nwith a trace of C++")
        results = func(*args, **kwargs)
        aliases = [value.alias_info for value in func._schema.returns]
        if any(alias is not None and alias.is_write for alias in aliases):
            self.works.append(lambda: func(*args, **kwargs))
        elif not any(aliases) and not func.name().startswith("aten::empty"):
            made = [value for value in tree_leaves(results) if isinstance(value, torch.Tensor)]
            for value in made:
                value.fill_(113)

            def work():
                again = [value for value in tree_leaves(func(*args, **kwargs)) if isinstance(value, torch.Tensor)]
                for value, new in zip(made, again, strict=True):
                    value.copy_(new)

            self.works.append(work)
        return results


class Place:
    """In the place of `CapturePlace`."""

    made = 0

    def __init__(self, gpu):
        Place.made += 1
        self.index, self.gpu, self.stream, self.lock = -1, gpu, f"place {Place.made}", threading.RLock()

    @contextlib.contextmanager
    def entered(self):
        yield

    def held(self):
        return self.gpu.held


class Copy:
    def __init__(self, target, source, size):
        self.ends, self.size = {cuda.Copy.TARGET: target, cuda.Copy.SOURCE: source}, size

    def move(self, end, address):
        self.ends[end] = address

    def do(self):
        ctypes.memmove(self.ends[cuda.Copy.TARGET], self.ends[cuda.Copy.SOURCE], self.size)


def aligned(shape, stride, dtype):
    """Memory that begins where torch's does on a GPU."""
    size = torch.empty_strided(shape, stride, dtype=dtype, device="meta").untyped_storage().nbytes()
    memory = torch.empty(size + 512, dtype=torch.uint8)
    begin = -memory.data_ptr() % 512
    return memory[begin : begin + size].view(dtype).as_strided(shape, stride, begin // dtype.itemsize)


class FakeGpu:
    """`pool` has the contexts of an engine with these inputs; `made` are its contexts, `stream` the current stream.

    `scratch` is the engine's scratch memory for all shapes in bytes, or `None` where each call takes its own.
    """

    def __init__(self, monkeypatch, specs, scratch=None, constraints=(), memory=1 << 30):
        self.made, self.captures, self.captured, self.replayed, self.fails = [], {}, 0, 0, []
        self.stream, self.scratch = SIDE, scratch or 0
        self.current = threading.local()
        self.streams = collections.defaultdict(threading.RLock)  # each does one thing after the other
        for file in (execution, inputs):
            monkeypatch.setattr(file, "ALIGNMENT", 16)
        monkeypatch.setattr(graph_memory, "empty", aligned)
        monkeypatch.setattr(execution, "empty", self.empty)
        for file in (pool, idle_contexts):
            monkeypatch.setattr(file, "is_capturing", lambda: False)
        monkeypatch.setattr(pool, "current_device", lambda: -1)
        monkeypatch.setattr(pool, "current_stream", lambda index: getattr(self.current, "stream", self.stream))
        monkeypatch.setattr(cuda, "beside_captures", contextlib.nullcontext)
        monkeypatch.setattr(cuda, "enter_context", lambda index: None)
        monkeypatch.setattr(cuda, "synchronize", lambda stream: True)
        monkeypatch.setattr(cuda, "is_torchs", lambda stream, index: True)
        monkeypatch.setattr(cuda_graph, "CapturedGraph", lambda stream: Captured(self, stream))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(total_memory=memory))
        stream = SimpleNamespace(wait_stream=lambda other: None, cuda_stream=SIDE)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
        monkeypatch.setattr(torch.cuda, "ExternalStream", lambda handle, device: stream)
        monkeypatch.setattr(graphed, "CapturedGraph", lambda stream: CapturedTorch(self, stream))
        monkeypatch.setattr(graphed, "CapturePlace", lambda index: Place(self))
        monkeypatch.setattr(graphed, "current_device", lambda: -1)
        monkeypatch.setattr(graphed, "CPU", None)
        monkeypatch.setattr(graphed, "current_stream", lambda index: getattr(self.current, "stream", self.stream))
        for file in (graphed, execution):
            monkeypatch.setattr(file, "is_capturing", lambda: getattr(self.current, "capturing", False))
        self.breaks = 0  # captures that are broken off
        self.held = 0  # bytes of the memory of places
        names = ["y" + spec.name[1:] for spec in specs]
        leaves = [{"output": place} for place in range(len(specs))]
        interface = Interface(specs, {}, [], names, {"tuple": []}, leaves, constraints)
        self.pool = self.pool_of(interface, scratch)
        self.loaded = self.pool.loaded

    def pool_of(self, interface, scratch=None):
        """The contexts of an engine that doubles its inputs."""
        given = inputs.Inputs(interface, torch.device("cpu"))
        given.index = -1
        loaded = loaded_engine.LoadedEngine.__new__(loaded_engine.LoadedEngine)
        loaded.__dict__.update(
            interface=interface,
            inputs=given,
            lock=SharedLock(),
            fits=fits.Fits(),
            scratch=scratch,
            profiles=len(interface.profiles),
            outputs=[(name, torch.float32) for name in interface.outputs],
            placeholder=torch.empty(64),
            create_context=lambda: self.context(interface),
            engine=None,
            refitter=None,
        )
        made = pool.ContextPool.__new__(pool.ContextPool)
        made.__dict__.update(
            interface=interface,
            inputs=given,
            index=-1,
            loaded=loaded,
            profiles=loaded.profiles,
            lock=threading.RLock(),
            idle={},
            unused=[],
            external=object(),
            captured=[],
            graphs={},
            traffic=graph_cache.Traffic(),
            memory=graph_memory.GraphMemory(),
            uncapturable=None,
            failures=0,
            stream=OWN,
            capture_stream=CAPTURE,
        )
        return made

    def run_on(self, model_trt):
        """Give a `TRTModule` that doubles its inputs contexts of this GPU."""
        made = self.pool_of(model_trt.interface)
        model_trt._pools, model_trt._index = {made.index: made}, made.index
        return made

    def empty(self, shape, stride, dtype):
        """Memory of a call, which stays a capture's."""
        memory = aligned(shape, stride, dtype)
        if (works := getattr(self.current, "works", None)) is not None:
            works.append(lambda: memory)
        return memory

    def context(self, interface):
        self.made.append(Context(self, interface))
        return self.made[-1]

    def do(self, stream, work):
        if stream in self.captures:
            self.captures[stream].append(work)
        else:
            with self.streams[stream]:
                work()

    def call(self, *tensors, **options):
        """A call of the pool, whose results are compared with the inputs' doubles."""
        results = self.pool.run(list(tensors), **options)
        for x, y in zip(tensors, results, strict=True):
            assert torch.equal(y, x * 2), "a result is wrong"
        return results

    def told(self):
        """What all contexts were told since the last time."""
        found = [item for context in self.made for item in context.told]
        for context in self.made:
            context.told.clear()
        return found


def rows(name="x", most=64, opts=(8,), columns=5):
    """An input of float32[1..most, columns] with an optimization profile for each of these numbers of rows."""
    opt, *others = ((opt, columns) for opt in opts)
    return Input(name, torch.float32, (1, columns), opt, (most, columns), others=tuple(others))
