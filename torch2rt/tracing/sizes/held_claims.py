"""Whether the claims of a trace hold for every size that is served: proven, checked at every call, or refused."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import sympy
from torch.utils._sympy.functions import Max, Min

from torch2rt.errors import TraceError
from torch2rt.graph import Decision, Split
from torch2rt.interface import Interface
from torch2rt.size_choices import choices_of, counterexample
from torch2rt.sizes import Dim, Symbols, describe, truths
from torch2rt.tracing.sizes.accepted_sizes import AcceptedSizes, IsRefused, Sizes, impossible_end


def hold(
    decisions: list[Decision],
    ranges: Symbols,
    interface: Interface,
    is_refused: IsRefused = lambda sizes: False,
    splits: list[Split] | None = None,
) -> Interface:
    """Raise `TraceError` for the first claim that is false inside the ranges.

    Returns the interface that checks every call for the claims that no range can express. `is_refused` says whether the
    module itself raises an error with some sizes, where the others are the opt ones. Where `splits` is given, the
    claims that narrow the range are put there, and raise nothing.
    """

    def narrow(decision: Decision, wrong: Mapping[Dim, int]) -> None:
        error = _narrowing_error(decision, ranges, wrong)
        if splits is None:
            raise error
        splits.append(Split(decision, error))

    accepted, relations, undecided = AcceptedSizes(ranges, interface, is_refused), [], []
    for decision in decisions:
        wrong = counterexample(decision.claim, ranges)
        if wrong is None or accepted.try_add(decision.claim):
            continue
        if isinstance(wrong, bool):
            undecided.append(decision)
        elif not interface.is_relation(decision.claim, ranges):
            narrow(decision, wrong)
        elif impossible := impossible_end(decision.claim, ranges):
            narrow(decision, impossible)
        else:
            relations.append(decision)
    claims = [decision.claim for decision in relations]
    for decision in list(relations):
        is_demand = decision.internal and not decision.claim.has(
            Min, Max
        )  # as of the sizes of a sum: others raise errors
        for sizes in _counterexamples(decision.claim, claims, ranges) if not is_demand else ():
            if not is_refused(sizes):
                narrow(decision, {ranges[symbol]: size for symbol, size in sizes.items()})
                relations.remove(decision)
                break
    interface = accepted.constrained()  # before relations, which may say the same with less ease
    for decision in [*relations, *undecided]:
        interface = interface.constrained(decision.claim, ranges)
    return interface


def _narrowing_error(decision: Decision, ranges: Symbols, wrong: Mapping[Dim, int]) -> TraceError:
    """The error for a claim that is false for some sizes of the ranges."""
    sizes = ", ".join(f"{dim} = {size}" for dim, size in wrong.items())
    asked = ", ".join(f"{dim} from {dim.min} to {dim.max}" for dim in wrong)
    return TraceError(
        f"{decision.place}: the module only does the same for every size if {describe(decision.claim, ranges)}, "
        f"which is false for {sizes}. "
        f"Asked for: {asked}. Narrow the range, make the dimension static, or build one engine for each side."
    )


def _counterexamples(claim: sympy.Basic, claims: list[sympy.Basic], ranges: Symbols) -> list[Sizes]:
    """Some sizes for which a claim is false and as many as possible of the other claims are true."""
    choices = choices_of(ranges, *claims)
    false = ~truths(claim, choices.sizes)
    met = sum(truths(other, choices.sizes).astype(int) for other in claims)
    places = np.flatnonzero(false & (met == np.max(met, where=false, initial=0)))
    return [choices.at(place) for place in dict.fromkeys([*places[:1], *places[len(places) // 2 :][:1], *places[-1:]])]
