"""An execution context of an engine, told only what has changed since its last call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch2rt.backend.cuda import contiguous_strides, empty, is_capturing
from torch2rt.backend.quirks import runs_alone_at_other_shapes
from torch2rt.backend.tensorrt import LOG
from torch2rt.errors import EngineError, InputError
from torch2rt.runtime.fits import Fit, Output, Shapes
from torch2rt.runtime.inputs import ALIGNMENT, LOWEST_ADDRESS, SCRATCH_ALIGNMENT
from torch2rt.runtime.loaded_engine import LoadedEngine

NEEDS_WARM_UP = (
    "CUDA graph capture needs a context that has run with these shapes on this stream: call the module once on it, as "
    "the warm-up for a capture does, before each capture"
)


class Execution:
    """An execution context, with the shapes and addresses that it was told last.

    It is warm once it has run with these shapes, and only then can a call be part of a CUDA graph. What other contexts
    have found out about shapes is not found out again (see `Fits`). A run with other shapes than the one before has the
    engine for itself (see `torch2rt.backend.quirks.runs_alone_at_other_shapes`).

    An exact one asks TensorRT how much scratch memory new shapes need, which takes TensorRT for RTX 1.6 40 us, and the
    next run 20 us more; runs with the same shapes then take 30 us less. One that is not has what serves all shapes.
    Whether that one may run beside others with the same shapes again is not known, so it never does.
    `changes` counts the changes of shape, `repeats` the choices of this context for the same shapes in a row.
    """

    def __init__(self, loaded: LoadedEngine, exact: bool = True) -> None:
        with LOG.capture() as log:
            context = loaded.create_context()
        if context is None:
            raise loaded.refusal(log)
        self.loaded, self.inputs, self.lock = loaded, loaded.inputs, loaded.lock
        self.context = context
        self.execute, self.set_address = context.execute_async_v3, context.set_tensor_address
        self.exact, self.changes, self.repeats = exact, 0, 0
        self.is_alone = runs_alone_at_other_shapes()
        self.profile = 0 if loaded.profiles == 1 else -1  # -1: not known
        self.forget()

    def forget(self) -> None:
        """Take nothing for known: after an error, the next call tells the context everything again."""
        self.shapes: list[Any] | None = None
        self.told: Sequence[Any] = [None] * len(self.inputs.names)
        self.outputs: Sequence[Output] = []
        self.addresses = [-1] * (len(self.inputs.names) + len(self.loaded.outputs))
        self.scratch, self.scratch_address = 0, -1
        self.warm = False

    def run(
        self, tensors: Sequence[torch.Tensor], stream: int, keep_scratch: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor]:
        """Enqueue one call on a stream, and return the outputs, whose memory belongs to torch's current stream.

        So does the scratch memory. Torch may give it to others after the call, unless `keep_scratch` takes it.
        """
        try:
            shapes = [tensor.shape for tensor in tensors]
        except (AttributeError, RuntimeError):
            self.inputs.check(tensors)  # some are not tensors at all
            raise
        if self.is_alone and not (self.exact and self.warm and self.shapes == shapes):
            # All of it: a thread that waits for Python's own lock meanwhile keeps all others waiting.
            return self.lock.alone(self.run_prepared, tensors, shapes, stream, keep_scratch, self.execute)
        return self.run_prepared(tensors, shapes, stream, keep_scratch, self.execute_beside_others)

    def run_prepared(
        self,
        tensors: Sequence[torch.Tensor],
        shapes: list[Any],
        stream: int,
        keep_scratch: list[torch.Tensor] | None,
        execute: Callable[[int], bool],
    ) -> list[torch.Tensor]:
        """As `run`, by a function that enqueues the call."""
        held: Any = None  # inputs that were copied, until the engine is enqueued
        inputs = self.inputs
        try:
            if not self.warm or self.shapes != shapes:
                self.fit(tensors, shapes, stream)
            addresses, dtypes, dense, index, place = self.addresses, inputs.dtypes, inputs.dense, inputs.index, 0
            for tensor in tensors:
                if (
                    tensor.dtype is not dtypes[place]
                    or tensor.get_device() != index
                    or not dense[place](tensor)
                    or tensor.is_neg()
                    or (address := tensor.data_ptr()) < LOWEST_ADDRESS
                    or address % ALIGNMENT
                ):
                    tensor = inputs.usable(place, tensor)
                    held = held, tensor
                    address = tensor.data_ptr() or self.loaded.placeholder.data_ptr()
                if address != addresses[place]:
                    self.set_address(inputs.names[place], address)
                    addresses[place] = address
                place += 1
        except (AttributeError, RuntimeError, TypeError):
            inputs.check(tensors)  # some are not what they should be, or not tensors at all
            raise
        outputs = []
        for name, shape, stride, dtype in self.outputs:
            output = empty(shape, stride, dtype)
            address = output.data_ptr() or self.loaded.placeholder.data_ptr()
            if address != addresses[place]:
                self.set_address(name, address)
                addresses[place] = address
            outputs.append(output)
            place += 1
        if self.scratch:
            scratch = empty((self.scratch,), (1,), torch.uint8)
            if (address := scratch.data_ptr()) != self.scratch_address:
                self.set_scratch(address)
            if keep_scratch is not None:
                keep_scratch.append(scratch)
        if not execute(stream):
            raise EngineError(_could_not_run())
        self.warm = True
        return outputs

    def execute_beside_others(self, stream: int) -> bool:
        """Enqueue the engine while other contexts do so; whether TensorRT could."""
        lock = self.lock
        try:
            lock.acquire(self)
            return self.execute(stream)  # type: ignore[no-any-return]
        finally:
            lock.release(self)

    def enqueue(self, stream: int) -> None:
        """Do the last call again, on the same memory."""
        if self.warm and self.exact or not self.is_alone:
            done = self.execute_beside_others(stream)
        else:
            done = self.lock.alone(self.execute, stream)
        if not done:
            raise EngineError(_could_not_run())
        self.warm = True

    def move(self, addresses: Sequence[int], scratch_address: int) -> None:
        """Have the last call, done again, read, write and work at other addresses: of inputs, outputs, scratch."""
        names = [*self.inputs.names, *[name for name, *_ in self.outputs]]
        for place, (name, address) in enumerate(zip(names, addresses, strict=True)):
            self.set_address(name, address)
            self.addresses[place] = address
        if self.scratch:
            self.set_scratch(scratch_address)

    def set_scratch(self, address: int) -> None:
        """Have runs work in this memory; TensorRT would log that an address is not aligned, and take the one before."""
        if address % SCRATCH_ALIGNMENT:
            raise EngineError(
                f"The scratch memory at {address:#x} does not begin at a multiple of {SCRATCH_ALIGNMENT}."
            )
        self.scratch_address = -1
        self.context.set_device_memory(address, self.scratch)
        self.scratch_address = address

    def can_be_captured(self, stream: int) -> bool:
        """Whether calls may be part of a CUDA graph, as far as TensorRT says; only that for RTX does."""
        return bool(getattr(self.context, "is_stream_capturable", lambda _: True)(stream))

    def fit(self, tensors: Sequence[torch.Tensor], shapes: list[Any], stream: int) -> None:
        """Prepare for other shapes than those of the last call, on a stream; `run` keeps other contexts out."""
        fits, key = self.loaded.fits, tuple(shapes)
        if is_capturing() or (fit := fits.get(key)) is None:
            self.inputs.check(tensors)
            if is_capturing():
                raise EngineError(NEEDS_WARM_UP)
            with LOG.capture() as log:
                fit = self.fit_first(key, stream, log)
            fits.keep(key, fit)
        else:
            self.tell(fit.told, fit.profile, stream)
        self.outputs, self.shapes = fit.outputs, shapes

    def fit_first(self, shapes: Shapes, stream: int, log: Sequence[str]) -> Fit:
        """Tell TensorRT of shapes that the engine takes, and ask what it will give for them."""
        interface = self.inputs.interface
        told = [spec.in_memory(tuple(shape)) for spec, shape in zip(interface.inputs, shapes, strict=True)]
        profile = interface.nearest_profile(shapes)
        self.tell(told, profile, stream, log)
        outputs = []
        for name, dtype in self.loaded.outputs:
            shape = tuple(self.context.get_tensor_shape(name))
            if min(shape, default=0) < 0:
                raise EngineError(f"TensorRT cannot tell the shape of output '{name}' before it has run.")
            outputs.append((name, shape, contiguous_strides(shape), dtype))
        return Fit(told, outputs, profile)

    def tell(
        self, told: Sequence[tuple[int, ...]], profile: int, stream: int, log: Sequence[str] | None = None
    ) -> None:
        """Tell TensorRT the profile and the shape of each input, if they are others than before; `log`: its errors."""
        self.shapes, self.warm = None, False
        self.changes, self.repeats = self.changes + 1, 0
        if profile != self.profile:
            self.choose(profile, stream)
        context, before = self.context, self.told
        for place, sizes in enumerate(told):
            if sizes != before[place] and not context.set_input_shape(self.inputs.names[place], sizes):
                why = "; ".join(LOG.recent() if log is None else log)
                raise InputError(f"TensorRT refuses the shape {sizes} of input '{self.inputs.names[place]}': {why}")
        self.told = told
        if not self.exact:
            self.scratch = self.loaded.scratch or 0
            return
        self.scratch, self.scratch_address = context.update_device_memory_size_for_shapes(), -1
        if self.scratch < 0:
            why = "; ".join(LOG.recent() if log is None else log)
            raise EngineError(f"TensorRT cannot tell how much memory these shapes need: {why}")

    def choose(self, profile: int, stream: int) -> None:
        """Take another optimization profile, of which the next run is as the first of all."""
        self.forget()
        self.profile = -1
        if not self.context.set_optimization_profile_async(profile, stream):
            raise EngineError(f"TensorRT refuses optimization profile {profile}: {'; '.join(LOG.recent())}")
        self.profile = profile


def _could_not_run() -> str:
    return "TensorRT could not run the engine: " + ("; ".join(LOG.recent()) or "it gave no reason")
