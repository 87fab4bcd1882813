"""Everything torch2rt raises on purpose.

    Torch2RTError
    ├── ConversionError      the module cannot become an engine
    │   ├── TraceError       its Python does something a fixed graph cannot
    │   ├── UnsupportedError it makes calls that have no converter (all of them are listed)
    │   └── BuildError       TensorRT refused the network
    ├── InputError           arguments that do not fit, of a conversion or of a call (also a ValueError)
    └── EngineError          an engine or state dict that cannot be used here (also a RuntimeError)
"""
from __future__ import annotations


class Torch2RTError(Exception):
    """The root of the tree above."""


class ConversionError(Torch2RTError):
    """The module cannot become an engine."""


class TraceError(ConversionError):
    """The module's Python does something that a fixed graph cannot express."""


class UnsupportedError(ConversionError):
    """The module makes calls that have no converter."""


class BuildError(ConversionError):
    """TensorRT refused a layer or the network; its own log is in the message."""


class InputError(Torch2RTError, ValueError):
    """Arguments of a conversion or of a call that do not fit."""


class EngineError(Torch2RTError, RuntimeError):
    """An engine or state dict that is damaged, or made for another TensorRT or GPU."""
