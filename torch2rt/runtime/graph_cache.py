"""Which calls are worth a CUDA graph, and how many graphs are kept.

A capture takes as long as dozens of calls, and the graph keeps an execution context. So shapes are captured when they
come back, and a graph that is kept gives way only to shapes that come back far more often.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.arguments import whole_number

EPOCH = 2048  # calls without a graph, of which the counts are kept until the next ones have passed
ADVANTAGE = 32  # calls that shapes must have come more often than twice those of the graph which gives way to them


@dataclasses.dataclass(frozen=True)
class GraphCache:
    """How a module keeps CUDA graphs: `model_trt.cuda_graph = GraphCache(...)`; `True` stands for `GraphCache()`.

    - `shapes`: the number of graphs, over all streams and shapes.
    - `bytes`: of GPU memory that the graphs hold in all, a quarter of the GPU's if not given. Graphs of one stream
      share their memory, except for borrowed outputs. Shapes that need more run without a graph.
    - `after`: the call with the same shapes that is captured while there is room: 1 for the first.

    Raises `InputError` for anything but whole numbers, `shapes` and `after` at least 1.

    >>> GraphCache(shapes=64, bytes=4e9)
    GraphCache(shapes=64, bytes=4000000000, after=2)
    """

    shapes: int = 16
    bytes: int | None = None
    after: int = 2

    def __post_init__(self) -> None:
        for name, least in (("shapes", 1), ("bytes", 0), ("after", 1)):
            value = whole_number(f"GraphCache({name}=...)", getattr(self, name), least)
            object.__setattr__(self, name, value if value is not None or name == "bytes" else 1)


DEFAULT = GraphCache()


class Traffic:
    """How often shapes came, of late, to calls that had no graph: in this epoch of such calls and the one before.

    Counts are approximate: threads that count at the same time may lose a call.
    """

    def __init__(self) -> None:
        self.calls: dict[Hashable, int] = {}  # by shapes, over all streams; and by stream, borrowing and shapes
        self.before: dict[Hashable, int] = {}  # the same of the epoch before
        self.addresses: dict[Hashable, list[int]] = {}  # of the last call's inputs, by shapes
        self.left = EPOCH
        self.bar = 0  # the calls that shapes need, at least, to take another graph's place

    def is_worth(self, key: Any, tensors: Sequence[torch.Tensor], graphs: Mapping[Any, Any], cache: GraphCache) -> bool:
        """Count a call, and say whether it should be captured; `key` is its stream, borrowing and shapes."""
        if self.left <= 0:
            self._begin(graphs)
        self.left -= 1
        calls, before, shapes = self.calls, self.before, key[2]
        calls[shapes] = total = calls.get(shapes, 0) + 1
        calls[key] = own = calls.get(key, 0) + 1
        if len(graphs) < cache.shapes:
            is_worth = own > 0 and total + before.get(shapes, 0) >= cache.after
        elif (own := own + before.get(key, 0)) < self.bar:  # replays are counted meanwhile, which can only raise it
            return False
        else:
            replays = [graph.calls + graph.calls_before for graph in list(graphs.values())]
            self.bar = ADVANTAGE + 2 * min(replays, default=0)
            is_worth = own >= self.bar
        if not is_worth:
            self.addresses[shapes] = [tensor.data_ptr() for tensor in tensors]
        return is_worth

    def brings_others(self, key: Any, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether the call before with these shapes is known to have had its inputs elsewhere."""
        before = self.addresses.pop(key[2], None)
        return before is not None and before != [tensor.data_ptr() for tensor in tensors]

    def leave_alone(self, key: Any) -> None:
        """Shapes that cannot be captured now: let many calls go by until they are tried again."""
        self.calls[key] = -EPOCH

    def captured(self, key: Any) -> None:
        """Shapes have their graph, whose own count goes on."""
        self.calls.pop(key, None)
        self.before.pop(key, None)
        self.bar = 0

    def _begin(self, graphs: Mapping[Any, Any]) -> None:
        """Begin another epoch."""
        self.left, self.bar = EPOCH, 0
        self.before, self.calls, self.addresses = self.calls, {}, {}
        for graph in list(graphs.values()):
            graph.calls_before, graph.calls = graph.calls, 0


def least_replayed(graphs: Mapping[Any, Any], most: int, key: Any) -> list[Any]:
    """The keys of the graphs beyond so many that were replayed the least of late; `key`'s is not among them."""
    others = sorted((other for other in graphs if other != key), key=lambda k: graphs[k].calls + graphs[k].calls_before)
    return others[: max(0, len(graphs) - most)]
