"""What a trace decided about dynamic sizes, and whether it holds for every size the engine serves.

While a module runs, Python asks symbolic sizes for plain answers (`if x.shape[0] > 2`). Each answer is a claim. Before
an engine is built from the trace, every claim is checked against the served ranges: one that fails for some size is an
error naming the dimension and the line. A claim that no single range can express becomes a check at every call: a
relation between dimensions, a size that the module itself refuses although it accepts smaller and larger ones, and a
claim that can be neither proven nor refuted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import sympy
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv
from torch.utils._sympy.functions import Mod
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy

from torch2rt.errors import ConversionError, TraceError
from torch2rt.graph import Assumed, Decision, Split
from torch2rt.interface import Interface, Shape
from torch2rt.size_choices import choices_of, counterexample
from torch2rt.sizes import Dim, Symbols, describe, evaluate, has_float_functions, holds, truths
from torch2rt.tracing.patches.number_types import maker_of_numbers
from torch2rt.tracing.sizes.accepted_sizes import Sizes, narrowed
from torch2rt.tracing.sizes.held_claims import hold
from torch2rt.tracing.sizes.kernel_choices import FEW_ENOUGH, is_asked_in, is_difference, is_kernel_choice, or_equal
from torch2rt.tracing.sizes.shortened import ShortSizes
from torch2rt.tracing.source_lines import SourceLocation

Accepts = Callable[[Sequence[Shape]], bool]
MOST_TERMS = 1000  # of a question about sizes; torch takes minutes for the calls of a module that goes on from there


class TooNestedError(TraceError):
    """A size depends on the inputs' sizes through more operations than can be reasoned about."""


class Decisions:
    """The claims of one trace, and the shape environment that they are made to.

    `number_makers` are the globals of code that has made a plain number of a size, perhaps by `int(size)`.
    """

    def __init__(self, symbols: Symbols, location: SourceLocation, unbacked: bool = False) -> None:
        self.symbols = symbols
        self.location = location
        self.traced_sizes: dict[sympy.Symbol, int] = {}
        self.claims: dict[sympy.Basic, Decision] = {}
        self._answers: dict[sympy.Basic, sympy.Basic | None] = {}
        self.assumed = Assumed([], symbols)
        self.shape_env = _ShapeEnv(self, unbacked)
        self.number_makers: list[dict[str, Any]] = []
        self.reads_place = False
        self.closed = False  # the trace is over: what is asked from here on becomes no claim of it
        self._depth = 0
        self._of_values: dict[sympy.Symbol, ValueRanges] = {}  # sizes that depend on values, where they are not 0
        self._not_empty: list[sympy.Basic] = []

    @contextmanager
    def in_torch(self) -> Iterator[None]:
        """A context for torch's own code: what it asks about sizes is not the user's doing."""
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1

    @property
    def is_in_torch(self) -> bool:
        """Whether torch's own code is running, for a call that was seen."""
        return self._depth > 0

    @contextmanager
    def reading_place(self, reads_place: bool) -> Iterator[None]:
        """A context for a call that may read a fixed place, as `x[5]` does."""
        before, self.reads_place = self.reads_place, self.reads_place or reads_place
        try:
            yield
        finally:
            self.reads_place = before

    @contextmanager
    def in_user_code(self) -> Iterator[None]:
        """A context for the user's Python, where torch's own code calls it back."""
        depth, self._depth = self._depth, 0
        try:
            yield
        finally:
            self._depth = depth

    def answer(self, expr: sympy.Basic) -> sympy.Basic | None:
        """The answer to a question that has but one for all sizes that are served; `None` if there are two.

        torch would find it by rewriting the question, which can take it seconds where sizes are rounded.
        """
        is_question = isinstance(expr, sympy.logic.boolalg.Boolean) and not expr.is_Atom
        if not is_question or not expr.free_symbols <= self.symbols.keys():
            return None
        if expr not in self._answers:
            answer = sympy.true if holds(expr, self.traced_sizes) else sympy.false
            claim = expr if answer is sympy.true else sympy.Not(expr)
            self._answers[expr] = answer if counterexample(claim, self.symbols) is None else None
        return self._answers[expr]

    def note(self, expr: sympy.Basic, answer: Any, guarded: bool) -> None:
        """Take down the answer to one question.

        torch's own code asks whether sizes differ, from each other and from 0 and 1, to choose between ways to the same
        result: answers that they do are its own affair. That they are equal, or which is larger, is not, even where
        torch knows it without a guard, because it takes every size for at least 2. The user's Python is held to the
        real range.
        """
        internal = self._depth > 0
        if not expr.free_symbols or not expr.free_symbols <= set(self.symbols):
            return  # torch answers about sizes that depend on values where it is always so
        if answer is True or answer is sympy.true:
            claim = expr
        elif answer is False or answer is sympy.false:
            claim = sympy.Not(expr)
        else:
            claim = sympy.Eq(expr, answer)
            if not internal:
                self.note_number_maker()
        if isinstance(claim, sympy.Not) and isinstance(claim.args[0], sympy.Or):
            claim = sympy.And(*map(sympy.Not, claim.args[0].args))
        if internal and not guarded and not isinstance(claim, sympy.core.relational.Relational):
            return
        if internal and isinstance(
            claim, (sympy.And, sympy.Or)
        ):  # several sizes checked at once: ask about one at a time
            for part in claim.args:
                if self.shape_env.evaluate_expr(part) and isinstance(claim, sympy.Or):
                    break
            return
        for part in claim.args if isinstance(claim, sympy.And) else (claim,):  # each may be of another kind
            self._add(part, guarded, internal)

    def _add(self, claim: sympy.Basic, guarded: bool, internal: bool) -> None:
        """Take down one claim, the first place that makes it, and the user's rather than torch's."""
        known = self.claims.get(claim)
        if known is None or (known.internal and not internal):
            if internal and (is_difference(claim) or is_kernel_choice()):
                return
            assumed = internal and not guarded and not isinstance(claim, sympy.Eq)
            claim = or_equal(claim) if assumed else claim
            self.claims.setdefault(claim, Decision(claim, self.location.here(), internal, assumed, self.reads_place))
            if isinstance(claim, sympy.Eq) and not assumed:
                self.shape_env.know(claim)

    def sizes_where(self, claim: sympy.Basic) -> Sizes | None:
        """Sizes for which a claim is true, with all claims of the trace; `None` if there are none."""
        if claim == sympy.false:
            return None
        choices = choices_of(self.symbols, claim, *self.claims)
        true = truths(claim, choices.sizes)
        for other in self.claims if true.any() else ():
            true = true & truths(other, choices.sizes)
        return {**self.traced_sizes, **choices.at(int(np.flatnonzero(true)[0]))} if true.any() else None

    def may_be_below(self, size: sympy.Basic, bound: int) -> bool:
        """Whether a size is smaller than a number for some sizes of the inputs."""
        choices = choices_of(self.symbols, size)
        return bool(choices.sizes) and bool(truths(sympy.Lt(size, bound), choices.sizes).any())

    def set_aside(self) -> dict[sympy.Basic, Decision]:
        """Remove and return what the user's Python has claimed, so that only what it claims again counts.

        Equalities stay: torch replaces a size that it knows to be equal to another, and so would not ask again.
        """
        aside = {c: d for c, d in self.claims.items() if not d.internal and not isinstance(c, sympy.Eq)}
        self.claims = {c: d for c, d in self.claims.items() if c not in aside}
        return aside

    def fixed(self) -> dict[sympy.Symbol, sympy.Basic]:
        """The sizes that torch takes for numbers, also where it concluded that from several claims."""
        sizes = {symbol: self.shape_env.replace(symbol) for symbol in self.symbols}
        return {symbol: size for symbol, size in sizes.items() if size.is_number}

    def note_number_maker(self) -> None:
        """The module's Python makes a plain number, perhaps by `int`."""
        scope = maker_of_numbers(self.location.frame())
        if scope is not None and not any(scope is known for known in self.number_makers):
            self.number_makers.append(scope)

    def note_unbacked(self, symbol: sympy.Symbol) -> int | None:
        """A new size that depends on values: it may be 0, whatever a fake kernel says. Returns the most that it can be.

        That of torchvision's `nms` says that at least 2 boxes are left, so that `if not len(boxes)` would be decided.
        """
        ranges = self.shape_env.var_to_range
        most = ranges[symbol].upper
        ranges[symbol] = ValueRanges(0, most)
        self._of_values[symbol] = ValueRanges(1, max(most, 1))
        return int(most) if most.is_number and most < 2**31 else None

    def asserted(self) -> tuple[sympy.Basic, ...]:
        """What torch has taken for granted about sizes that depend on values, such as that two of them are equal."""
        asserts = self.shape_env.deferred_runtime_asserts.values()
        return tuple(dict.fromkeys([*(each.expr for some in asserts for each in some), *self._not_empty]))

    def unless_empty(self, question: Any) -> sympy.Basic | None:
        """The answer to a question about sizes that depend on values, if it is one and the same unless some are 0.

        The module's Python may treat that as a case of its own (`if len(boxes) == 0`). Then the graph is for the other
        case, and calls check that it is theirs.
        """
        if not isinstance(question, sympy.Basic):
            return None
        ranges = self._of_values | {s: ValueRanges(dim.min, dim.max) for s, dim in self.symbols.items()}
        if not question.free_symbols <= ranges.keys():
            return None
        try:
            answer = bound_sympy(question, ranges)
        except (NotImplementedError, AssertionError, TypeError, AttributeError):
            return None  # torch's range analysis does not know this operation
        if not answer.is_singleton():
            return None
        self._not_empty.append(question if answer.lower == sympy.true else sympy.Not(question))
        return answer.lower

    def check(self, interface: Interface, accepts: Accepts, splits: list[Split] | None = None) -> Interface:
        """Raise `TraceError` for the first claim that narrows the range; returns the interface with the ties added.

        `accepts` says whether the module runs with these shapes. Claims that narrow the range are put into `splits`
        where that is given, and raise nothing.
        """
        for symbol, size in self.fixed().items():
            claim = sympy.Eq(symbol, size)
            self.claims.setdefault(claim, Decision(claim, "all in all", True))
        equalities = [d for d in self.claims.values() if isinstance(d.claim, sympy.Eq)]
        ties = [d for d in equalities if all(arg in self.symbols for arg in d.claim.args)]
        tied = self._tied_ranges(ties)

        known: dict[tuple[Shape, ...], bool] = {}

        def is_refused(sizes: Sizes) -> bool:
            """Whether the module raises an error; where another path ties sizes, it may only do so for unequal ones."""
            for some in (sizes, self._with_alike(sizes)):
                shapes = self._shapes_with(some, ties, interface)
                if (key := tuple(shapes)) not in known:
                    known[key] = not accepts(shapes)
                if not known[key]:
                    return False
            return True

        interface = hold([d for d in self.claims.values() if not d.assumed], tied, interface, is_refused, splits)
        self.assumed = Assumed([d for d in self.claims.values() if d.assumed], tied)
        inputs = list(interface.inputs)
        for symbol, dim in tied.items():
            inputs[dim.input] = narrowed(inputs[dim.input], dim)
            if dim.step > 1:
                rest = f"{dim.min % dim.step} plus " if dim.min % dim.step else ""
                claim = sympy.Eq(Mod(symbol - dim.min % dim.step, dim.step), 0)
                interface = interface.constrained(claim, tied, f"{dim} to be {rest}a multiple of {dim.step}")
        return dataclasses.replace(interface, inputs=inputs)

    def _with_alike(self, sizes: Sizes) -> Sizes:
        """Some sizes, and the same for the dimensions that have the same range."""
        of_range = {self.symbols[symbol].sizes: size for symbol, size in sizes.items()}
        alike = {symbol: of_range[dim.sizes] for symbol, dim in self.symbols.items() if dim.sizes in of_range}
        return {**alike, **sizes}

    def _shapes_with(self, sizes: Sizes, ties: list[Decision], interface: Interface) -> list[Shape]:
        """The opt shapes but for some sizes, and those that must equal them."""
        sizes = dict(sizes)
        for _ in ties:
            for tie in ties:
                known = [sizes[arg] for arg in tie.claim.args if arg in sizes]
                sizes.update((arg, known[0]) for arg in tie.claim.args if known and arg not in sizes)
        shapes = [list(spec.opt) for spec in interface.inputs]
        for symbol, size in sizes.items():
            dim = self.symbols[symbol]
            shapes[dim.input][dim.axis] = size
        return [tuple(shape) for shape in shapes]

    def _tied_ranges(self, ties: list[Decision]) -> dict[sympy.Symbol, Dim]:
        """The ranges of the symbols, each narrowed to those of the dimensions it must equal."""
        ranges = dict(self.symbols)
        for _ in ties:
            for tie in ties:
                left, right = (ranges[arg] for arg in tie.claim.args)
                low, high = max(left.min, right.min), min(left.max, right.max)
                if low > high:
                    raise TraceError(
                        f"{tie.place}: {left} and {right} must be equal, their ranges {left.min} to {left.max} and "
                        f"{right.min} to {right.max} have nothing in common."
                    )
                for arg in tie.claim.args:
                    ranges[arg] = ranges[arg].between(low, high)
        return ranges


class _ShapeEnv(ShapeEnv):
    """torch's shape environment, telling `Decisions` about every question and its answer."""

    def __init__(self, decisions: Decisions, unbacked: bool) -> None:
        super().__init__(duck_shape=False, allow_scalar_outputs=False, allow_dynamic_output_shape_ops=unbacked)
        self._decisions = decisions
        self._short = ShortSizes(decisions.symbols)
        self._replacements_version_counter = 1  # with 0, torch's sizes do not ask `replace`
        self._terms: dict[sympy.Basic, int] = {}
        self._in_evaluation = False

    def replace(self, expr: Any) -> Any:
        """What torch takes for every size that it reasons about: with the sizes that it knows, and in few terms."""
        return self._short.shortened(super().replace(expr) if self.replacements else expr)

    def know(self, claim: sympy.Basic) -> None:
        """Write sizes as is right where an equality is true."""
        if self._short.know(claim):
            self._replacements_version_counter += 1  # so that torch's sizes ask again

    def _simplify_floor_div(self, expr: Any) -> Any:
        """torch calls this for a number that is rounded, and rewrites it as is right for sizes of at least 2."""
        return expr

    def _count(self, expr: sympy.Basic) -> int:
        """How many terms an expression has, its own and those of its arguments."""
        if expr.args and expr not in self._terms:
            self._terms[expr] = 1 + sum(map(self._count, expr.args))
        return self._terms.get(expr, 1)

    def known(self, claim: sympy.Basic) -> sympy.Basic | None:
        """The answer to a question that has but one for all sizes that this trace serves: see `sizes.answer`."""
        if isinstance(claim, sympy.logic.boolalg.BooleanAtom):
            return claim
        for answer, same in ((sympy.true, claim), (sympy.false, sympy.Not(claim))):
            if same in self._decisions.claims:
                return answer
        return self._decisions.answer(claim)

    def _maybe_evaluate_static(self, expr: Any, **options: Any) -> Any:
        """The answer to a question, or the value of a number, where torch can tell without asking for the sizes."""
        if not has_float_functions(expr):
            found = super()._maybe_evaluate_static(expr, **options)
            return None if self._is_of_larger_sizes(expr, found) else found
        if options.get("compute_hint"):
            return sympy.sympify(evaluate(expr, self._decisions.traced_sizes))
        if options.get("unbacked_only"):
            return expr
        return self._decisions.answer(expr)  # torch's analysis of ranges raises errors for what it does not know

    def _is_of_larger_sizes(self, expr: Any, found: Any) -> bool:
        """Whether torch takes two sizes for equal, or one for larger, only as it takes every size for at least 2.

        What it asks in `evaluate_expr` becomes a claim; what it looks up beside, as for the end of a slice, would not.
        """
        if self._in_evaluation or not isinstance(found, sympy.logic.boolalg.BooleanAtom):
            return False
        if not isinstance(expr, sympy.core.relational.Relational) or not expr.free_symbols:
            return False
        return not is_difference(expr if found else sympy.Not(expr)) and self.known(expr) is None

    _maybe_evaluate_static.cache_clear = ShapeEnv._maybe_evaluate_static.cache_clear  # type: ignore[attr-defined]

    def evaluate_expr(self, orig_expr: sympy.Basic, *args: Any, **kwargs: Any) -> Any:
        if isinstance(orig_expr, sympy.Basic) and self._count(orig_expr) > MOST_TERMS:
            raise TooNestedError(
                f"{self._decisions.location.here()}: the module rounds sizes again and again, as layers do that each "
                f"pad to a multiple and crop. Here a size is an expression of more than {MOST_TERMS} terms. Make the "
                "dimensions static, or pad the inputs once, before the module."
            )
        if (answer := self._decisions.answer(orig_expr)) is not None:
            return answer
        if self._is_of_values(orig_expr) and is_asked_in(FEW_ENOUGH):
            return sympy.false
        if self._decisions.closed and self._has_two_answers(orig_expr):
            raise ConversionError(
                "what is made of this call is right only for sizes with "
                f"{describe(orig_expr, self._decisions.symbols)}, or only for others"
            )
        before, was_in_evaluation = len(self.guards), self._in_evaluation
        self._in_evaluation = True
        try:
            answer = super().evaluate_expr(orig_expr, *args, **kwargs)
        except GuardOnDataDependentSymNode:
            if (answer := self._decisions.unless_empty(orig_expr)) is None:
                raise
            return answer
        finally:
            self._in_evaluation = was_in_evaluation
        if self._decisions.is_in_torch and self._suppress_guards_tls():
            return answer  # torch copies what it knows of another tensor
        if isinstance(orig_expr, sympy.Basic) and not orig_expr.is_Atom or isinstance(orig_expr, sympy.Symbol):
            self._decisions.note(orig_expr, answer, len(self.guards) > before)
        return answer

    def _has_two_answers(self, question: Any) -> bool:
        """Whether a question has another answer for other sizes that are served, also where torch asks it."""
        if not isinstance(question, sympy.logic.boolalg.Boolean) or not question.free_symbols:
            return False
        claims = (question, sympy.Not(question))
        return not any(map(is_difference, claims)) and self.known(question) is None

    def _is_of_values(self, claim: Any) -> bool:
        """Whether a question is about sizes that depend on values."""
        return isinstance(claim, sympy.Basic) and not claim.free_symbols <= self._decisions.symbols.keys()
