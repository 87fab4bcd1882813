"""What is known of one of several engines that serve a range together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from torch2rt.interface import Interface


@dataclasses.dataclass(frozen=True)
class EngineVariant:
    """One of the engines that serve a range together, or the only one.

    - `index`: its place among them. `interface`: the ranges of its inputs, and what calls are checked for.
    - `region`: the sizes it serves, in the user's terms, such as `x.shape[1] % 2 == 0`.
    - `line`: the line that split the range, as `file:line`; empty where none did.
    - `notes`: how it is known to be right for sizes at which the module takes another path, such as
      `verified by values at x.shape[0] == 1`.
    - `size`: of its plan, in bytes.
    """

    index: int
    interface: Interface
    region: str
    line: str
    notes: Sequence[str]
    size: int

    def __str__(self) -> str:
        line = f" ({self.line})" if self.line else ""
        notes = "".join(f", {note}" for note in self.notes)
        return f"variant {self.index}: {self.region}{line}{notes}, {self.size / 2**20:.1f} MiB"

    def to_json(self) -> dict[str, Any]:
        """The variant as JSON values."""
        data = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {**data, "interface": self.interface.to_json(), "notes": list(self.notes)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> EngineVariant:
        """The inverse of `to_json`."""
        return cls(**{**data, "interface": Interface.from_json(data["interface"]), "notes": tuple(data["notes"])})
