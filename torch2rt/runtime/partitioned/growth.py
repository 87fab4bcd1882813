"""What becomes of an engine that meets a size which depends on values and is larger than it was built for."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence

import torch

from torch2rt.errors import ConversionError, InputError
from torch2rt.interface import Input, Interface, Shape
from torch2rt.runtime.module import TRTModule

LOGGER = logging.getLogger("torch2rt")
Make = Callable[[int, Sequence[torch.Tensor]], TRTModule]


class Growth:
    """Builds engines again for larger sizes, each time once for all threads.

    - `is_bound`: larger sizes are an error instead, as the user has said how large they become.
    - `make`: the engine of a segment for the sizes of these tensors and smaller ones, with its network and a report of
      how far off it is; raises `InputError` for sizes beyond the user's bound. `None`: torch makes the calls with
      larger sizes.
    - `took`: is told of a segment with another engine, and of that engine.
    """

    def __init__(
        self,
        is_bound: bool = False,
        make: Make | None = None,
        took: Callable[[int, TRTModule], None] = lambda index, larger: None,
    ) -> None:
        self.is_bound, self.make, self.took = is_bound, make, took
        self.lock = threading.Lock()
        self.noted: set[int] = set()  # segments of which it was said that torch makes their calls

    def check(self, index: int, interface: Interface, shapes: Sequence[Shape]) -> bool:
        """Whether sizes of a segment's inputs are too large for it; raises `InputError` if that is an error."""
        if (beyond := first_beyond(interface, shapes)) is None:
            return False
        if self.is_bound:
            spec, axis, size = beyond
            raise InputError(
                f"Input '{spec.name}' of segment {index} has size {size} in dimension {axis}, which depends on "
                f"values, and max_sizes allows {spec.max[axis]}. Convert with a larger one, or with max_sizes=(first, "
                "most) for engines that are built again where sizes are larger than the first."
            )
        return True

    def grow(self, index: int, segment: TRTModule, tensors: Sequence[torch.Tensor]) -> bool:
        """Build a segment's engine again, if sizes are too large for it; `False` where torch makes this call.

        So it does in other threads meanwhile.
        """
        shapes = [tuple(tensor.shape) for tensor in tensors]
        if not self.check(index, segment._interface(), shapes) or index in self.noted:
            return False
        if not self.lock.acquire(blocking=False):
            return False
        try:
            interface = segment._interface()
            if not self.check(index, interface, shapes):
                return True  # another thread has done so
            if self.make is None:
                self._note(index, "the conversion's network is not kept (keep_network)")
                return False
            before = _ranges(interface)
            try:
                larger = self.make(index, tensors)
            except ConversionError as error:
                self._note(index, str(error))
                return False
            engine = larger.plan
            segment.take(engine, *larger.networks())
            self.took(index, larger)
            LOGGER.warning(
                "Segment %d was built again, as a size that depends on values is larger than before: %s, now %s. "
                "max_sizes= says how large such sizes become.",
                index,
                before,
                _ranges(engine.interface),
            )
            return True
        finally:
            self.lock.release()

    def _note(self, index: int, why: str) -> None:
        self.noted.add(index)
        LOGGER.warning("Torch makes the calls of segment %d for sizes beyond its engine's: %s", index, why)


def first_beyond(interface: Interface, shapes: Sequence[Shape]) -> tuple[Input, int, int] | None:
    """The first size that is larger than an engine takes: its input, dimension and the size."""
    for spec, shape in zip(interface.inputs, shapes, strict=True):
        for axis, (size, most) in enumerate(zip(shape, spec.max, strict=True)):
            if size > most:
                return spec, axis, size
    return None


def _ranges(interface: Interface) -> str:
    return ", ".join(f"{spec.name}: {spec.describe()}" for spec in interface.inputs)
