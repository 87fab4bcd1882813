"""What a conversion rests on: `model_trt.report`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Difference:
    """How far one output was off the module's in one call.

    - `output`: its name. `shapes`: those of the call's inputs.
    - `error`, `allowed`: absolute differences; of integers and bools, how many numbers differ and how many do where the
      module itself is disturbed by roundings. Where numbers of several magnitudes stand side by side, those of the
      magnitude that is nearest to its limit.
    - `largest`: the largest finite absolute value of the output.
    """

    output: str
    shapes: list[list[int]]
    error: float
    allowed: float
    largest: float

    def __str__(self) -> str:
        return f"{self.output}: error {self.error:.1e}, allowed {self.allowed:.1e}, values up to {self.largest:.1e}"


@dataclasses.dataclass
class Verification:
    """A comparison of a conversion with its module.

    - `mode`: `"example"` (the example inputs) or `"range"` (also other sizes and values).
    - `by`: what was compared with the module: the engine on a GPU, or the reference, which evaluates the network.
    - `seconds`: how long it took.
    - `differences`: one for each output and call.
    - `notes`: what limits its meaning, in sentences.
    """

    mode: str
    by: str
    seconds: float = 0.0
    differences: list[Difference] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines, shapes = [f"verified ({self.mode}) by {self.by}, in {self.seconds:.2f} s"], None
        for difference in self.differences:
            if difference.shapes != shapes:
                shapes = difference.shapes
                lines.append("  inputs of " + ", ".join("x".join(map(str, s)) or "scalar" for s in shapes))
            lines.append(f"    {difference}")
        return "\n".join(lines + [f"  {note}" for note in self.notes])


@dataclasses.dataclass
class Report:
    """What was verified of a conversion, what it assumed, and what its calls need.

    - `verified`: a `Verification`; `None` if there was none.
    - `assumptions`: sentences about what the engine does otherwise than the module, or takes for granted.
    - `needs`: claims about sizes that every call is checked for, beyond the ranges of the inputs.
    - `without_cuda_graphs`: why calls run without CUDA graphs though `cuda_graph` asks for them; `None` if they do not,
      or before the engine was used.
    - `variants`: where the module takes several paths, a line for each engine: the sizes that it serves, the line of
      the module that asked, how it is known to be right where the module takes another path, and its size.
    - `segments`: for a module that was partitioned, a line for each segment in the order in which they run: how many
      calls it has, and for torch segments why they are not TensorRT's.

    - `measured`: with `fallback="measure"`, what calls took as engines and by torch: the whole, and each segment
      that is an engine.

    It prints as text and `to_json` makes JSON values of it, which are saved beside the engine.

    >>> print(Report(assumptions=["a float64 table is computed in float32"]))
    not verified
    assumes: a float64 table is computed in float32
    """

    verified: Verification | None = None
    assumptions: list[str] = dataclasses.field(default_factory=list)
    needs: list[str] = dataclasses.field(default_factory=list)
    without_cuda_graphs: str | None = None
    variants: list[str] = dataclasses.field(default_factory=list)
    segments: list[str] = dataclasses.field(default_factory=list)
    measured: list[str] = dataclasses.field(default_factory=list)

    def __str__(self) -> str:
        lines = ["not verified" if self.verified is None else str(self.verified), *self.segments]
        lines += [f"measured: {text}" for text in self.measured]
        lines += [f"assumes: {text}" for text in self.assumptions] + [f"needs: {text}" for text in self.needs]
        lines += self.variants
        if self.without_cuda_graphs:
            lines.append(f"runs without CUDA graphs: {self.without_cuda_graphs}")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Report:
        """The inverse of `to_json`; what is not there is taken as not known."""
        verified = data.get("verified")
        if verified is not None:
            verified = Verification(**{**verified, "differences": [Difference(**d) for d in verified["differences"]]})
        assumptions, needs = (list(data.get(name, ())) for name in ("assumptions", "needs"))
        variants, segments, measured = (list(data.get(name, ())) for name in ("variants", "segments", "measured"))
        return cls(verified, assumptions, needs, data.get("without_cuda_graphs"), variants, segments, measured)
