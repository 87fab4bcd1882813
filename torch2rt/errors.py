"""Everything torch2rt raises on purpose.

Torch2RTError
├── ConversionError      the module cannot become an engine
│   ├── TraceError       its Python does something a fixed graph cannot
│   ├── UnsupportedError it makes calls that have no converter (all of them are listed)
│   ├── BuildError       TensorRT refused the network
│   └── AccuracyError    the result does not compute what the module does
├── InputError           arguments that do not fit, of a conversion or of a call (also a ValueError)
└── EngineError          an engine or state dict that cannot be used here (also a RuntimeError)
    └── RefitError       an engine that cannot have the weights of other parameters
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Torch2RTError(Exception):
    """The root of the tree above."""


class ConversionError(Torch2RTError):
    """The module cannot become an engine."""


class TraceError(ConversionError):
    """The module's Python does something that a fixed graph cannot express."""


class UnsupportedError(ConversionError):
    """The module makes calls that have no converter.

    Attributes: `calls`, the names of the traced graph's nodes that cannot be converted, each with the reason. It is
    empty where what is wrong is no single call.
    """

    def __init__(self, message: str, calls: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.calls = dict(calls or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.calls)


class BuildError(ConversionError):
    """TensorRT refused a layer or the network; its own log is in the message."""


class AccuracyError(ConversionError):
    """What was converted differs from its module by more than roundings explain.

    Attributes: `differences` (a `torch2rt.engine.report.Difference` for each output that is wrong), `module` (the
    path of the first module whose result differs, if that was found) and `source` (its line, `file:line`).
    """

    def __init__(
        self, message: str, differences: Sequence[Any] = (), module: str | None = None, source: str | None = None
    ) -> None:
        super().__init__(message)
        self.differences, self.module, self.source = list(differences), module, source

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.differences, self.module, self.source)


class InputError(Torch2RTError, ValueError):
    """Arguments of a conversion or of a call that do not fit."""


class EngineError(Torch2RTError, RuntimeError):
    """An engine or state dict that is damaged, or made for another TensorRT or GPU."""


class RefitError(EngineError):
    """An engine cannot have the weights of other parameters: the network itself would be another one.

    Attributes: `names`, the parameters, buffers and attributes of the module that it cannot follow.
    """

    def __init__(self, message: str, names: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.names = list(names)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.names)
