"""Where in the user's code a call comes from: module path and source line, read off the Python stack."""

from __future__ import annotations

import os
import sys
from types import FrameType
from typing import Any

import torch

_TORCH = os.path.dirname(torch.__file__) + os.sep
_MODULE_CALL = torch.nn.Module._call_impl.__code__


def modules_of(root: Any) -> dict[str, Any]:
    """The modules of a module by their paths, as its user knows them: what is around it for a conversion has none."""
    root = getattr(root, "_orig_mod", root)
    return dict((root.module if getattr(root, "is_around_module", False) else root).named_modules())


class SourceLocation:
    """Where in the user's code the trace of one module is."""

    def __init__(self, root: torch.nn.Module) -> None:
        self.latest = ""  # the path of the module that was last asked for
        self._paths: dict[int, str] = {}
        self._root = type(root).__name__
        for name, module in modules_of(root).items():
            self._paths.setdefault(id(module), name)

    def module(self) -> str:
        """The path of the innermost submodule that is running, `""` for the root."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _MODULE_CALL and (path := self._paths.get(id(frame.f_locals["self"]))) is not None:
                self.latest = path
                return path
            frame = frame.f_back
        return ""

    def line(self) -> str:
        """`file:line` of the innermost frame that is neither torch's nor ours."""
        frame = self.frame()
        return f"{frame.f_code.co_filename}:{frame.f_lineno}" if frame is not None else ""

    def frame(self) -> FrameType | None:
        """The innermost frame that is neither torch's nor ours."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and _is_library(frame):
            frame = frame.f_back
        return frame

    def of(self, error: BaseException) -> str:
        """The innermost line of the user's that an error has come through, as `here` gives it."""
        trace, line, module = error.__traceback__, "", ""
        while trace is not None:
            frame = trace.tb_frame
            if not _is_library(frame):
                line = f"{frame.f_code.co_filename}:{trace.tb_lineno}"
            elif frame.f_code is _MODULE_CALL:
                module = self._paths.get(id(frame.f_locals["self"]), module)
            trace = trace.tb_next
        return f"{line} (in {module})" if line and module else line or module or self._root

    def here(self) -> str:
        """Both, for the beginning of a message."""
        module, line = self.module(), self.line()
        return f"{line} (in {module})" if module else line


def _is_library(frame: FrameType) -> bool:
    """Whether code is torch's, ours or nobody's."""
    name = frame.f_code.co_filename
    ours = frame.f_globals.get("__name__", "").startswith("torch2rt.")
    return ours or name.startswith((_TORCH, "<"))
