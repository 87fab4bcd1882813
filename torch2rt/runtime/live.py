"""What ties a converted module to the module that it came from: new weights for the same network."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.nn.modules.module import _EXTRA_STATE_KEY_SUFFIX

from torch2rt.engine.engine import Engine
from torch2rt.errors import InputError, RefitError
from torch2rt.network import Network
from torch2rt.recipes.contents import Content, contents
from torch2rt.recipes.replay import Recipes, Unreplayable
from torch2rt.recipes.settings import differences, settings
from torch2rt.recipes.tensors import Attribute, attributes, inner_tensors, named_tensors
from torch2rt.runtime.shared_lock import SharedLock

OUTSIDE = "a tensor that the module's forward uses, and does not own"
LOGGER = logging.getLogger("torch2rt")
Tensors = dict[str, torch.Tensor]
Weights = list[dict[int, torch.Tensor]]  # of each network, by number
Take = Callable[[Weights | None], bool]


class Live:
    """The networks of a converted module, which can be given the weights of other parameters.

    - `module`: what they were made of; it is not kept alive. `networks`: with `recipes`.
    - `lower`: makes the networks of a module again, with other calibration data if they are given.
    - `build`: makes the engine of the networks as they are.
    - `calibrates`: whether values are quantised by ranges that calibration has found.
    - `reads`: shared by whoever evaluates the networks, and held alone while their weights change.

    A refit replays the recipes of what has changed. Where that is not enough, because Python has read a value that is
    another one now, or a plain attribute of the module has changed, the module is traced and lowered again. If the new
    network differs in nothing but its weights, the engine gets those.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        networks: Sequence[Network],
        lower: Callable[[torch.nn.Module, Any], list[Network]],
        build: Callable[[list[Network]], Engine],
        calibrates: bool = False,
    ) -> None:
        self._module = weakref.ref(module)
        self.networks, self._lower, self._build = list(networks), lower, build
        self.calibrates = calibrates
        self.lock, self.reads = threading.RLock(), SharedLock()
        self._pending: Weights = []  # that engines have, and the networks' own copies do not have yet
        self._settings, self._modes = settings(module), _modes_of(module)
        values = _tensors_of(module)
        self._contents = contents({name: values[name] for name in self.names})
        self._outside = self._contents_outside()
        for recipes in self._recipes:
            recipes.check(values)

    @property
    def _recipes(self) -> list[Recipes]:
        return [network.recipes for network in self.networks if network.recipes is not None]

    @property
    def names(self) -> list[str]:
        """The module's parameters, buffers and attributes that the networks depend on."""
        return list(dict.fromkeys(name for recipes in self._recipes for name in recipes.places))

    @property
    def has_module(self) -> bool:
        """Whether the module that the networks were made of is still there."""
        return self._module() is not None

    def module(self) -> torch.nn.Module:
        """The module that the networks were made of; raises `InputError` if it is gone."""
        if (module := self._module()) is None:
            raise InputError("The module that was converted is gone. Pass a module or a state dict to refit with.")
        return module

    def tensors(self) -> list[torch.Tensor]:
        """The module's tensors that show by their write counters whether the networks are out of date.

        Batch norms write to their statistics without counting it, but count their batches. Raises `InputError` for
        tensors that were made in inference mode, in which torch counts no writes.
        """
        values = _tensors_of(self.module())
        names = dict.fromkeys([*self.names, *(name for name in values if name.endswith("num_batches_tracked"))])
        if uncounted := [name for name in names if name in values and values[name].is_inference()]:
            raise InputError(f"follow cannot notice writes to {', '.join(uncounted)}, made in inference mode.")
        found = [values[name] for name in names if name in values]
        return [*found, *(x for recipes in self._recipes for x in recipes.outside)]

    def attributes(self) -> list[Attribute]:
        """The module's tensors that are no parameters or buffers, and where they are held."""
        module = self.module()
        return attributes(getattr(module, "_orig_mod", module))

    # What has changed ------------------------------------------------------------------------------------------------

    def changed(self, source: Any = None) -> list[str]:
        """The names of what is another in a source than in the networks: tensors, and plain attributes of modules."""
        with self.lock:
            values = self._values(source)
            return list(dict.fromkeys([*self._changed(self._contents_of(values)), *self._others(source, values)]))

    def _contents_of(self, values: Tensors) -> dict[str, Content]:
        wanted = {name: values[name] for name in self.names if name in values}
        _check_dense(wanted)
        return contents(wanted)

    def _changed(self, now: Mapping[str, Content]) -> list[str]:
        return [name for name in self.names if name in now and now[name] != self._contents[name]]

    def _values(self, source: Any) -> Tensors:
        """The tensors of a module or a state dict by name; raises `InputError` for those of another module."""
        if source is None:
            source = self.module()
        if isinstance(source, torch.nn.Module):
            values = _tensors_of(source)
            missing = [name for name in self.names if name not in values]
            if missing and source is not self._module():
                raise InputError(f"The module to refit with has no {', '.join(missing)}.")
            return values
        if not isinstance(source, Mapping):
            raise InputError(f"refit takes a module or a state dict, not a {type(source).__name__}.")
        given = inner_tensors(_tensors_in(source))
        module = self._module()
        known = {*self.names, *(() if module is None else _tensors_of(module))}
        if unknown := sorted(given.keys() - known):
            raise InputError(f"The state dict has tensors that the module does not have: {', '.join(unknown)}.")
        for recipes in self._recipes:
            given = recipes.with_tied(given)
        return given

    def _others(self, source: Any, values: Tensors) -> list[str]:
        """What else differs from what the module was converted with: plain attributes, and tensors that are no more."""
        outside = [OUTSIDE] if self._contents_outside() != self._outside else []
        if isinstance(source, Mapping):
            return outside
        gone = [name for name in self.names if name not in values]
        return [*gone, *differences(self._settings, settings(self.module() if source is None else source)), *outside]

    def _contents_outside(self) -> dict[str, Content]:
        found = [x for recipes in self._recipes for x in recipes.outside]
        return contents({str(place): x for place, x in enumerate(found)})

    # New weights -----------------------------------------------------------------------------------------------------

    def refit(self, source: Any, strict: bool, take: Take, calibration: Any = None) -> list[str]:
        """Give the networks the weights of a source's values; returns the names of the tensors that have changed.

        `take` gives new weights to the engines that are loaded, and says whether they have them; with `None`, the
        networks are others, so that no engine can. `strict` raises `RefitError` instead. With `calibration`, ranges of
        values are found again on these data.
        """
        if calibration is not None and not self.calibrates:
            raise InputError(
                "refit(calibration=...) is for modules whose values are quantised, as precision='int8' and 'fp8' do."
            )
        with self.lock:
            values = self._values(source)
            now = self._contents_of(values)
            changed, other = self._changed(now), self._others(source, values)
            if calibration is not None:
                error = Unreplayable(changed, "ranges are found again")
                self._lower_again(self._as_module(source, values, error), None, strict, take, calibration)
                return changed
            if not changed and not other:
                return []
            try:
                if other:
                    raise Unreplayable(other, "what is no weight, such as attributes of the module, has changed")
                self._complete(values, changed)
                made = [recipes.replay(values, changed) for recipes in self._recipes]
            except Unreplayable as error:
                self._lower_again(self._as_module(source, values, error), error, strict, take)
            else:
                self._set(made, take)
                self._contents.update(now)
            return changed

    def _complete(self, values: Tensors, changed: Iterable[str]) -> None:
        """Add the values that it takes beside the changed ones, from the module that was converted."""
        needed = {name for recipes in self._recipes for name in recipes.needed(changed)} - values.keys()
        module = self._module()
        own = {} if module is None or not needed else _tensors_of(module)
        own = {name: own[name] for name in needed if name in own}
        same = contents(own)
        if lacks := sorted(name for name in needed if same.get(name) != self._contents[name]):
            raise InputError(
                f"The state dict lacks {', '.join(lacks)}, of which weights are made together with what it has."
            )
        values.update(own)

    def _as_module(self, source: Any, values: Tensors, error: Unreplayable) -> torch.nn.Module:
        """The source as a module: for a state dict, a copy of the module that was converted, with its values."""
        if not isinstance(source, Mapping):
            return self.module() if source is None else source
        module = copy.deepcopy(self.module())
        own = _tensors_of(module)
        for name in self.names:
            if name not in values and contents({name: own[name]})[name] != self._contents[name]:
                raise InputError(f"The state dict lacks {name}, and the module has another one than the engine.")
        for name, value in values.items():
            if own[name].shape != value.shape or own[name].dtype != value.dtype:
                raise RefitError(f"The module cannot take the state dict: {error}.", error.names)
            with torch.no_grad():
                own[name].copy_(value)
        return module

    def _lower_again(
        self, module: torch.nn.Module, error: Unreplayable | None, strict: bool, take: Take, calibration: Any = None
    ) -> None:
        """Take a module's values by making the networks again.

        Those that differ in more than weights take the place of the old ones, unless it is to be `strict`.
        """
        with _in_modes(module, self._modes):
            networks, values = self._lower(module, calibration), _tensors_of(module)
        for network in networks:
            if network.recipes is not None:
                network.recipes.check(values)
        if _are_alike(networks, self.networks):
            made = []
            for old, new in zip(self.networks, networks, strict=True):
                ours, theirs = _numbers(old), _numbers(new)
                made.append({ours[name]: new.weights[name].tensor for name in theirs})
            self._set(made, take)
            self._flush()
            for old, new in zip(self.networks, networks, strict=True):
                _adopt(old, new)
        else:
            self._replace(networks, error, strict, take)
        self._settings = settings(module)
        self._contents = self._contents_of(values)
        self._outside = self._contents_outside()

    def _replace(self, networks: list[Network], error: Unreplayable | None, strict: bool, take: Take) -> None:
        """Have other networks in the place of these."""
        names = [] if error is None else error.names
        if error is not None and strict:
            raise RefitError(
                f"The engine cannot be refitted: {error}. Convert the module again, or refit with strict=False, which "
                "builds an engine again.",
                names,
            )
        if len(networks) != len(self.networks):
            why = error or "ranges were found again"
            raise RefitError(f"The module takes other paths now, convert it again: {why}.", names)
        if error is not None:
            LOGGER.warning("torch2rt builds an engine again, as it cannot be refitted: %s", error)
        with self.reads.exclusive():
            self.networks, self._pending = networks, []
        take(None)

    def _set(self, made: Weights, take: Take) -> None:
        """Give new weights to the engines, and to the networks: at once, or when these are needed."""
        self._pending = self._pending or [{} for _ in self.networks]
        for network in self.networks:
            network.traced = network.lowered = None  # their constants are those of before
        for pending, weights in zip(self._pending, made, strict=True):
            pending.update(weights)
        if not take(made):
            self._flush()

    def _flush(self) -> None:
        """Copy weights that engines have to the networks' own."""
        pending, self._pending = self._pending, []
        if any(pending):
            with self.reads.exclusive():
                for recipes, weights in zip(self._recipes, pending, strict=True):
                    for number, value in weights.items():
                        recipes.weights[number].copy_(value)

    def up_to_date(self) -> list[Network]:
        """The networks, with the weights of the last refit."""
        with self.lock:
            self._flush()
            return self.networks

    def engine(self) -> Engine:
        """An engine of the networks as they are, which is built now."""
        with self.lock:
            return self._build(self.up_to_date())


def _modes_of(module: torch.nn.Module) -> dict[str, bool]:
    """Which of a module's modules train, by path."""
    plain = getattr(module, "_orig_mod", module)
    return {path: each.training for path, each in plain.named_modules(remove_duplicate=False)}


@contextlib.contextmanager
def _in_modes(module: torch.nn.Module, modes: Mapping[str, bool]) -> Iterator[None]:
    """A context in which a module's modules train that are among these, and no others."""
    plain, now = getattr(module, "_orig_mod", module), _modes_of(module)
    try:
        for path, each in plain.named_modules(remove_duplicate=False):
            each.training = modes.get(path, each.training)
        yield
    finally:
        for path, each in plain.named_modules(remove_duplicate=False):
            each.training = now.get(path, each.training)


def _tensors_of(module: torch.nn.Module) -> Tensors:
    return inner_tensors(named_tensors(getattr(module, "_orig_mod", module)))


def _tensors_in(state_dict: Mapping[str, Any]) -> Tensors:
    """The tensors of a state dict; raises `InputError` for other values, but the extra state that modules may have."""
    for name, value in state_dict.items():
        if not isinstance(value, torch.Tensor) and not str(name).endswith(_EXTRA_STATE_KEY_SUFFIX):
            raise InputError(
                f"refit takes tensors by the names of parameters and buffers, and {name!r} is a {type(value).__name__}."
                " A checkpoint may hold the state dict under one of its names."
            )
    return {name: value for name, value in state_dict.items() if isinstance(value, torch.Tensor)}


def _check_dense(tensors: Tensors) -> None:
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.is_quantized or value.is_meta:
            raise InputError(
                f"A refit takes dense tensors, and {name} is {value.dtype}, {value.layout}, {value.device}."
            )


def _numbers(network: Network) -> dict[str, int]:
    return {name: weight.number for name, weight in network.weights.items() if weight.number is not None}


def _are_alike(networks: Sequence[Network], others: Sequence[Network]) -> bool:
    """Whether networks differ in nothing but their weights."""
    return len(networks) == len(others) and all(
        a.structure is not None and a.structure == b.structure and a.weights.keys() == b.weights.keys()
        for a, b in zip(networks, others)
    )


def _adopt(old: Network, new: Network) -> None:
    """Let the recipes of a network make the weights of one that is alike from now on."""
    assert new.recipes is not None
    theirs = _numbers(new)
    new.recipes.weights = {number: old.weights[name].tensor for name, number in theirs.items()}
    old.recipes = new.recipes
    for name, weight in old.weights.items():
        old.weights[name] = type(weight)(weight.tensor, weight.origin, theirs.get(name))
