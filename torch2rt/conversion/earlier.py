"""What an earlier conversion of the same module in segments has found, kept beside its engines.

It is which calls stay torch calls, and why, and how far off the conversion was. With it and the engines, a conversion
lowers nothing, builds nothing and verifies nothing.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.fx.node import Node

from torch2rt.backend import disk_cache
from torch2rt.callables import qualified_name
from torch2rt.engine import engine_cache
from torch2rt.engine.report import Report
from torch2rt.errors import UnsupportedError
from torch2rt.graph_key import content
from torch2rt.passes.order import Pass

LOGGER = logging.getLogger("torch2rt")
KIND = "segments"
Refused = dict[Node, str]


class NotWhole(UnsupportedError):
    """A module is not one engine: its graph, with which a conversion in segments goes on, and what lowering said."""

    def __init__(self, graph: torch.fx.GraphModule, error: UnsupportedError | None = None) -> None:
        super().__init__(str(error or "an earlier conversion was one in segments"))
        self.graph, self.error = graph, error


@dataclasses.dataclass(frozen=True)
class Earlier:
    """The record of conversions of a traced graph: `file`, `None` where none is kept.

    - `refused`: the calls that stay torch calls, with the reasons; `report`: that of the earlier conversion. They are
      `None` before there was any.
    """

    graph: torch.fx.GraphModule
    file: Path | None
    refused: Refused | None = None
    report: Report | None = None

    @classmethod
    def of(
        cls, graph: torch.fx.GraphModule, passes: Sequence[Pass], nan: str, options: Mapping[str, Any], *choice: Any
    ) -> Earlier:
        """What is known of a graph and these passes; `choice` is what else decides which calls stay torch calls.

        Passes are known by their names: engines are looked up by what the passes have made of their segments.
        """
        names = [qualified_name(one) for one in passes]
        file = engine_cache.file_of(graph, options, nan, False, content, names, *choice, kind=KIND)
        data = None if file is None else disk_cache.read(file)
        if data is None:
            return cls(graph, file)
        nodes = list(graph.graph.nodes)
        try:
            found = json.loads(bytes(data))
            refused = {nodes[int(index)]: str(reason) for index, reason in found["refused"]}
            return cls(graph, file, refused, Report.from_json(found["report"]))
        except (ValueError, KeyError, TypeError, IndexError) as error:
            LOGGER.warning("The record of an earlier conversion %s is not used: %s", file, error)
            return cls(graph, file)

    def keep(self, refused: Refused, report: Report) -> None:
        """Write the record for later conversions."""
        if self.file is not None:
            index = {node: place for place, node in enumerate(self.graph.graph.nodes)}
            listed = [[index[node], reason] for node, reason in refused.items()]
            disk_cache.write(self.file, json.dumps({"refused": listed, "report": report.to_json()}).encode())

    def tell(self, report: Report) -> None:
        """Say in a report what was found before."""
        assert self.report is not None
        report.verified, report.assumptions = self.report.verified, list(self.report.assumptions)
        if report.verified is not None:
            report.verified.notes.append(engine_cache.EARLIER)

    def is_verified(self, mode: bool | str) -> bool:
        """Whether the earlier conversion was compared with the module as is asked for."""
        return self.report is not None and engine_cache.is_verified(self.report, mode)
