"""The memory of a module's CUDA graphs: one block for each stream, on which they never run at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from torch2rt.backend.cuda import empty

LEAST = 2 << 20  # bytes of a block: torch takes no less from the GPU
SPARE = 1.5  # a block has at most this many times the bytes that a graph of its stream needs


class NoRoom(Exception):
    """A graph's memory would be more than the graphs may hold."""


class GraphMemory:
    """A block of torch's memory for each stream, in which the graphs of the stream find room for all but their ends.

    A larger one takes the place of a block that is too small, after the graphs in it were dropped.
    """

    def __init__(self) -> None:
        self.blocks: dict[int, torch.Tensor] = {}  # by stream

    def held(self) -> int:
        """The bytes of all blocks."""
        return sum(block.nbytes for block in list(self.blocks.values()))

    def block(self, stream: int, size: int, most: int, drop: Callable[[], None]) -> torch.Tensor:
        """At least so many bytes on torch's current stream, which is this one; `drop` lets go of the graphs in a block.

        Raises `NoRoom` where all blocks together would be larger than `most`.
        """
        block = self.blocks.get(stream)
        before = 0 if block is None else block.nbytes
        others = self.held() - before
        if others + max(size, before) > most:
            raise NoRoom
        if block is not None and size <= before:
            return block
        del block
        drop()
        self.blocks.pop(stream, None)
        size = min(max(size, int(SPARE * before), LEAST), most - others)
        self.blocks[stream] = block = empty((size,), (1,), torch.uint8)
        return block

    def is_too_large(self, stream: int, needs: Sequence[int]) -> bool:
        """Whether a stream's block is more than its graphs need; the block of a stream without graphs is torch's."""
        if not needs:
            self.blocks.pop(stream, None)
        block = self.blocks.get(stream)
        return block is not None and block.nbytes > max(LEAST, int(SPARE * max(needs)))
