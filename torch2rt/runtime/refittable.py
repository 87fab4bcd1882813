"""A converted module whose weights can be changed: what it keeps of the network, and of the module it came from."""

from __future__ import annotations

import dataclasses
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torch2rt.engine.engine import Engine
from torch2rt.engine.weights import differing, named
from torch2rt.errors import EngineError, InputError
from torch2rt.network import Network
from torch2rt.runtime.converted import Converted
from torch2rt.runtime.follow import Follow
from torch2rt.runtime.live import Live, Weights
from torch2rt.runtime.pool import ContextPool
from torch2rt.runtime.refit import refit_engine
from torch2rt.runtime.variants import VariantPools, load

RANGES = "that quantised values have the ranges of before the refit, which refit(calibration=...) finds again"
UNVERIFIED = "that it is right with the weights that it was refitted with since it was verified"


class Refittable(Converted):
    """The part of `TRTModule` that holds the engine, and gives it the weights of other parameters."""

    _lock: threading.RLock
    _pools: dict[int | None, Any]

    def _engine(self) -> Engine:
        """The engine as it was built; raises `EngineError` while there is none."""
        raise NotImplementedError

    def _ready(self) -> Any:
        """The contexts on this module's GPU, where the engine is loaded if need be."""
        raise NotImplementedError

    def _hold(self, engine: Engine | None, networks: Sequence[Network] = ()) -> None:
        """Take an engine, and the networks that it was built of, in the place of what was there."""
        self._built, self._is_stale = engine, False
        self._live: Live | None = None
        self._follow: Callable[[], None] | None = None
        self._kept = list(networks)
        self._later: Callable[[], list[Network]] | None = None

    @property
    def built(self) -> Engine | None:
        """The engine, which is built again if it does not have the weights of the last refit."""
        if self._is_stale and self._live is not None:
            with self._live.lock:
                if self._is_stale:
                    self._built, self._is_stale = self._live.engine(), False
        return self._built

    @built.setter
    def built(self, engine: Engine | None) -> None:
        self._built, self._is_stale = engine, False

    def to_be_saved(self) -> Engine:
        """The engine with the weights that a call would use now; raises `EngineError` while there is none."""
        if self._follow is not None:
            self._follow()
        return self.built or self._engine()

    @property
    def plan(self) -> Engine:
        """The engine as it was built, which may have the weights of before a refit."""
        return self._engine()

    @property
    def is_stale(self) -> bool:
        """Whether the plan has other weights than the network; they are changed when it is loaded."""
        return self._is_stale

    def needs_weights(self) -> None:
        """Give the engine the weights of its network when it is loaded: it was built with others."""
        self._is_stale = True

    def _load(self, index: int | None) -> Any:
        """Load the engine on a GPU; one that has other weights than the network gets these, or is built again."""
        engine = self._engine()
        if self._is_stale and "refittable" in engine.made_by:
            networks = self._networks if self._live is None else self._live.up_to_date()
            if (weights := differing(engine, networks)) is not None:
                pool = load(engine, index)
                if _refit(pool, weights, lambda: networks):
                    return pool
            if self._live is None:
                raise EngineError("TensorRT does not give an engine that was built before the weights of this module.")
        return load(self.built or engine, index)

    @property
    def _networks(self) -> list[Network]:
        """The kept networks; those of an engine that was built before are made now."""
        with self._lock:
            if self._later is not None:
                self._kept, self._later = self._later(), None
            return self._kept

    @property
    def has_networks(self) -> bool:
        """Whether the networks are kept, or can be made."""
        return bool(self._kept) or self._later is not None

    def _current(self) -> list[Network]:
        """The kept networks, with the weights that the engine has by now."""
        return self._networks if self._live is None or not self._kept else self._live.up_to_date()

    def lower_later(self, networks: Callable[[], list[Network]]) -> None:
        """Make the networks when they are first asked for."""
        self._later = networks

    def drop_network(self) -> None:
        """Let go of the network, and of the weights that it holds; `reference()` and `refit()` need it."""
        self._kept, self._later, self._follow = [], None, None
        self._live = self._live if self._is_stale else None

    # Weights of other parameters -------------------------------------------------------------------------------------

    def make_live(self, live: Live) -> None:
        """Let `refit()` change the weights by what ties this module to the one that it came from."""
        self._live = live

    @property
    def follows(self) -> bool:
        """Whether calls take what the module that this one came from has become; not when that is gone."""
        return self._follow is not None and self._live is not None and self._live.has_module

    def follow(self) -> None:
        """From now on, refit before a call if the module that this one came from has changed.

        `load_state_dict` leaves the engine alone then, whose weights are those of that module. A copy of this module
        has an engine of its own, and follows none.

        `torch2rt.torch2rt` says under `follow` what is noticed. An engine that cannot have the new
        weights is built again. Raises `InputError` where the conversion was not `refittable`.
        """
        live, me = self._of_module(), weakref.ref(self)

        def update() -> None:
            if (module := me()) is not None:
                module.refit(strict=False)

        self._follow = Follow(live.module(), live.tensors, live.attributes, update)

    def refit(self, source: Any = None, *, strict: bool = True, calibration: Any = None) -> list[str]:
        """Take the values that a module's parameters and buffers have now; returns the names of those that changed.

        - `source`: a module like the one that was converted with `refittable=True`, or a state dict of such a module;
          by default that one itself. What a state dict lacks stays as it is.
        - `strict`: raise `RefitError`, which names the parameters, where the engine cannot have such weights: where
          their shapes or dtypes are others, the module's Python has looked at a value that is another one now, or a
          plain attribute of the module has changed and with it what the module computes. The engine then stays as it
          is. Otherwise it is built again.
        - `calibration`: for int8 and fp8, batches of inputs, as `torch2rt()` takes them. The scales of weights are
          always made again; the ranges of the values between layers (and what `smooth_quant` and `bias_correction` have
          made of them) are those that were found with the weights of before, unless they are found again on these
          batches. As they are no weights, an engine is then built.

        Only weights that were made of what has changed are made again, on the device where the values are. Calls that
        were enqueued before use the old weights, those that begin later the new ones. Where TensorRT cannot change the
        weights of an engine, or it is not loaded, an engine is built at its next use. The module stays in the mode
        that it was converted in, also while the other one trains.

        Raises `InputError` for a source with other parameters, and where the conversion was not `refittable`.

        >>> import torch
        >>> linear = torch.nn.Linear(3, 5)
        >>> from torch2rt import torch2rt
        >>> model_trt = torch2rt(linear, [torch.randn(2, 3)], refittable=True)
        >>> with torch.no_grad():
        ...     _ = linear.bias.add_(1)
        >>> model_trt.refit()
        ['bias']
        """
        with self._lock:  # before the lock within: an engine that is built again is loaded under both
            changed = self._of_module().refit(source, strict, self._take, calibration)
            if calibration is not None:
                self._engine().report.assumptions[:] = [x for x in self._engine().report.assumptions if x != RANGES]
            return changed

    def _warm_up_refits(self) -> None:
        """Give a loaded engine the weights that it has, if that was never done: TensorRT compiles when it first is."""
        if self._live is None or "refittable" not in self._engine().made_by:
            return
        with self._lock:
            pool = self._ready()
            if all(each.loaded.refitter is not None for each in _pools_of(pool)):
                return
            networks = self._live.up_to_date()
            if not _refit(pool, list(map(named, networks)), lambda: networks):
                self._pools, self._is_stale = {}, True

    def changed(self, source: Any = None) -> list[str]:
        """The names of the parameters and buffers whose values are others than the engine's, by comparing them all.

        The names of plain attributes of the module's that are others now come after them. `source` is as for `refit`.
        """
        return self._of_module().changed(source)

    def _of_module(self) -> Live:
        if self._live is None:
            raise InputError("This module cannot be refitted: convert with refittable=True and keep_network=True.")
        return self._live

    def _note_refit(self, has_ranges_of_before: bool) -> None:
        report = self._engine().report
        notes = [UNVERIFIED] if report.verified is not None else []
        notes += [RANGES] if has_ranges_of_before else []
        report.assumptions += [note for note in notes if note not in report.assumptions]

    def _take(self, made: Weights | None) -> bool:
        """Give all engines that are loaded new weights; those that cannot have them are built again when needed."""
        live = self._of_module()
        with self._lock:
            self._kept = live.networks
            self._note_refit(made is not None and live.calibrates)
            pools = list(self._pools.values())
            is_done = made is not None and bool(pools) and "refittable" in self._engine().made_by
            weights = [_by_name(network, new) for network, new in zip(live.networks, made or [])]
            is_done = is_done and all(_refit(pool, weights, live.up_to_date) for pool in pools)
            if not is_done:
                self._pools = {}
            if made is None:  # the plan is another network's
                self._built = dataclasses.replace(self._engine(), made_by=_without_refit(self._engine().made_by))
            self._is_stale = True
            return is_done


def _by_name(network: Network, made: Mapping[int, torch.Tensor]) -> dict[str, torch.Tensor]:
    """New weights of a network by the names that its engine knows them by."""
    names = network.weight_names()
    return {names[number]: weight for number, weight in made.items() if number in names}


def _refit(pool: Any, weights: Sequence[Mapping[str, torch.Tensor]], networks: Callable[[], Sequence[Network]]) -> bool:
    """Give the engines of a pool new weights by name; `False` if TensorRT refuses some.

    `networks` have the others that an engine may ask for.
    """
    pools = _pools_of(pool)
    return all(
        not new or refit_engine(each, new, lambda place=place: named(networks()[place]))  # type: ignore[misc]
        for place, (each, new) in enumerate(zip(pools, weights, strict=True))
    )


def _pools_of(pool: Any) -> list[ContextPool]:
    return pool.pools if isinstance(pool, VariantPools) else [pool]


def _without_refit(made_by: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in made_by.items() if name != "refittable"}
