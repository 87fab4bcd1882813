"""A module that answers at once, by the module that it is made of, and by an engine as soon as that is ready."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch

from torch2rt.backend.cuda import beside_captures
from torch2rt.background.sent import Watched
from torch2rt.errors import EngineError, InputError
from torch2rt.interface import Interface
from torch2rt.runtime.converted import Converted

LOGGER = logging.getLogger("torch2rt")
AT_EXIT = 60.0  # seconds that Python waits at its end for what cannot be interrupted, such as the loading of an engine


class BackgroundModule(Converted):
    """A module whose engine is made in the background: `torch2rt(..., background=True)` returns it.

    Calls run the module that it was made of, without gradients, until the engine is built, verified and warm; from one
    call to the next they run the engine then. The engine takes the shapes that it was converted for, and no others. If
    it cannot be had, calls go on to run the module, and the logger `torch2rt` has one message of level ERROR that says
    why.

    The module must not change until then: where its weights, its mode or its plain attributes are others when the
    engine is ready than those that it was built of, the engine is not used, and `error` names them. Afterwards, the
    engine has weights of its own.

    Attributes: `module` (which runs meanwhile), `converted` (what `torch2rt()` would have returned; `None` until it is
    built, and also there if it cannot run here), `error` (what went wrong, or `None`), `ready` and `wait`.

    >>> model_trt = torch2rt(model, [x], background=True)   # doctest: +SKIP
    >>> y = model_trt(x)                                    # doctest: +SKIP
    >>> model_trt.wait(60).report                           # doctest: +SKIP
    """

    def __init__(
        self,
        module: Any,
        make: Callable[[], Any],
        stop: Callable[[], None] = lambda: None,
        on_ready: Callable[[Any], None] | None = None,
        gpu: torch.device | None = None,
        watched: Watched | None = None,
    ) -> None:
        """`make` gives the converted module, for a GPU, in a thread of its own, which `stop` ends.

        `watched` tells what of `module` has changed since that was sent.
        """
        super().__init__()
        self._now: list[Any] = [_without_gradients(module)]  # in a list, as it is no part of the state dict
        self._eager = [module]
        self._converted: list[Any] = []
        self._errors: list[Exception] = []
        self._done = threading.Event()
        self._owner = os.getpid()
        work = weakref.ref(self), make, watched or Watched(module), on_ready, gpu
        thread = threading.Thread(target=_work, args=work, name="torch2rt background", daemon=True)
        self._finalizer = weakref.finalize(self, _stop, stop, thread)
        thread.start()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the engine, or the module until that is ready."""
        return self._now[0](*args, **kwargs)

    @property
    def module(self) -> Any:
        """The module that runs until the engine is ready."""
        return self._eager[0]

    @property
    def converted(self) -> Any:
        """What `torch2rt()` would have returned; `None` until it is built."""
        return next(iter(self._converted), None)

    @property
    def error(self) -> Exception | None:
        """Why there will be no engine; `None` if nothing went wrong until now."""
        return next(iter(self._errors), None)

    @property
    def ready(self) -> bool:
        """Whether calls run the engine."""
        return self._done.is_set() and not self._errors

    def wait(self, timeout: float | None = None) -> Any:
        """The converted module, when it is ready; raises its error, and `TimeoutError` after so many seconds."""
        if os.getpid() != self._owner and not self._done.is_set():
            raise EngineError("The engine is made by the process that this one was forked from.")
        if not self._done.wait(timeout):
            raise TimeoutError(f"The engine is not ready after {timeout} s.")
        if self._errors:
            raise self._errors[0]
        return self.converted

    def stop(self) -> None:
        """Let go of an engine that is not ready yet: `error` says so then. The module goes on to run."""
        self._finalizer()

    def _switch(self, converted: Any) -> None:
        self._now[:] = [converted]

    def _interface(self) -> Interface:
        return self.finished("its calling convention")._interface()  # type: ignore[no-any-return]

    @property
    def report(self) -> Any:
        """What was verified, what was assumed, and what calls need."""
        return self.finished("its report").report

    def finished(self, what: str) -> Any:
        """The converted module; raises `EngineError` that `what` is not known while there is none."""
        if self.converted is None:
            raise EngineError(f"The engine is not built yet, so {what} is not known: call wait().")
        return self.converted

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        for module in (self.module, self.converted):
            if isinstance(module, torch.nn.Module):
                module._apply(fn, recurse)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update(self.finished("its state dict").state_dict(prefix=prefix, keep_vars=keep_vars))

    def _load_from_state_dict(self, *args: Any) -> None:
        raise InputError(
            "A module whose engine is made in the background loads no state dict: load it into TRTModule()."
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        """A copy is the converted module."""
        return _itself, (self.finished("a copy of it"),)

    def extra_repr(self) -> str:
        if self.error is not None:
            return f"runs {type(self.module).__name__}, as there is no engine: {self.error}"
        return f"runs the engine: {self.converted!r}" if self.ready else f"runs {type(self.module).__name__} until then"


def _itself(value: Any) -> Any:
    return value


def _without_gradients(module: Any) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.no_grad():
            return module(*args, **kwargs)

    return run


def _work(
    ref: weakref.ref[BackgroundModule],
    make: Callable[[], Any],
    watched: Watched,
    on_ready: Callable[[Any], None] | None,
    gpu: torch.device | None,
) -> None:
    """What the thread does. It keeps the module alive only where it has something for it."""
    start = time.perf_counter()
    converted: Any = None
    try:
        converted = make()
        if (module := ref()) is None:
            return
        module._converted.append(converted)
        _check(module, watched)
        gpu = gpu_of(module.module) or gpu
        if gpu is not None:  # a new thread's current one is the first
            converted.to(gpu)
        converted.warm_up()
        _check(module, watched)
        module._switch(converted)
    except BaseException as error:  # also one that would end the thread: somebody may wait
        if (module := ref()) is None:
            return
        module._errors.append(
            error if isinstance(error, Exception) else EngineError(f"{type(error).__name__}: {error}")
        )
        level = logging.ERROR if module._finalizer.alive else logging.INFO  # it was asked to stop
        text = "There is no engine after %.1f s, so %s goes on to run: %s"
        LOGGER.log(level, text, time.perf_counter() - start, type(module.module).__name__, error)
    module._done.set()
    if module.ready and on_ready is not None:
        try:
            on_ready(module)
        except Exception:
            LOGGER.exception("on_ready= has failed.")


def _check(module: BackgroundModule, watched: Watched) -> None:
    """Raise `EngineError` where an engine must not be used any more."""
    if not module._finalizer.alive:
        raise EngineError("The conversion in the background was stopped.")
    with beside_captures() if torch.cuda.is_initialized() else contextlib.nullcontext():
        names = watched.changed(module.module)
    if names:
        raise EngineError(
            f"the engine is of the module as it was, and {', '.join(names[:5])}{' ...' if names[5:] else ''} has "
            "changed since: convert it again"
        )


def _stop(stop: Callable[[], None], thread: threading.Thread) -> None:
    """What is done when a module is let go of, and at the end of Python.

    There, a thread that comes back from C++ ends the process with an error; so it is waited for.
    """
    stop()
    if not threading.main_thread().is_alive():
        thread.join(AT_EXIT)


def gpu_of(module: Any, tensors: Iterable[Any] = ()) -> torch.device | None:
    """The GPU that a module is on, or else the tensors are; `None` if neither is."""
    own = (*module.parameters(), *module.buffers()) if isinstance(module, torch.nn.Module) else ()
    return next((t.device for t in (*own, *tensors) if isinstance(t, torch.Tensor) and t.is_cuda), None)


def check_on_ready(on_ready: Any, background: Any) -> None:
    """Raise `InputError` for what cannot be asked of a conversion."""
    if not isinstance(background, bool):
        raise InputError(f"{background=} is neither True nor False.")
    if on_ready is not None and not (background and callable(on_ready)):
        raise InputError("on_ready= is a function that is called with the module, and needs background=True.")
