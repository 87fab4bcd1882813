"""Questions about sizes by which torch chooses among kernels or memory layouts: the values are the same."""

from __future__ import annotations

import sys
from types import FrameType

import sympy

# Modules between the code that asks about a size and the answer.
_TRANSPARENT = frozenset(
    {
        __name__,
        "torch2rt.tracing.sizes.guards",
        "torch",
        "contextlib",
        "torch.fx.experimental.symbolic_shapes",
        "torch.fx.experimental.sym_node",
        "torch.fx.experimental.recording",
        "torch._guards",
        "torch.utils._contextlib",
    }
)
_CHOICES = {  # module and function
    ("torch._subclasses.fake_impls", "conv"),
    ("torch._prims_common", "is_contiguous"),
    ("torch._prims_common", "are_strides_like_channels_last"),
    ("torch._prims_common", "are_strides_like_channels_last_or_false"),
    ("torch._decomp.decompositions", "_upsample_nearest"),  # on a GPU few channels are better off contiguous
    ("torch._decomp.decompositions", "_upsample_linear"),
    ("torch._meta_registrations", "upsample_nearest2d"),
}
# torchvision goes from class to class if there are more boxes than so many, which gives the same boxes
FEW_ENOUGH = {("torchvision.ops.boxes", "batched_nms")}


def is_kernel_choice() -> bool:
    """Whether torch is choosing among kernels or layouts with the same values, as oneDNN does by batch size."""
    return is_asked_in(_CHOICES)


def is_asked_in(functions: set[tuple[str, str]]) -> bool:
    """Whether one of these functions asks about a size."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") in _TRANSPARENT:
        frame = frame.f_back
    return frame is not None and (frame.f_globals.get("__name__"), frame.f_code.co_name) in functions


def is_difference(claim: sympy.Basic) -> bool:
    """Whether a claim says that two sizes differ, or that one is neither 0 nor 1, of itself or as a factor."""
    if isinstance(claim, sympy.Not) and isinstance(claim.args[0], sympy.core.relational.Relational):
        claim = claim.args[0].negated
    if isinstance(claim, (sympy.Gt, sympy.Ge)):
        claim = claim.reversed
    if isinstance(claim, (sympy.Lt, sympy.Le)):
        small, large = claim.args
        if isinstance(claim, sympy.Lt) and _is_factor(large / small if small != 0 else large):
            return True  # one stride is smaller than another: 3 < 3 * size
        return small.is_Integer and 0 <= int(small) <= (1 if isinstance(claim, sympy.Lt) else 2)
    return isinstance(claim, sympy.Ne)


def _is_factor(quotient: sympy.Basic) -> bool:
    """Whether a quotient of two strides is a size, or a product of sizes."""
    return bool(quotient.is_integer and quotient.free_symbols) and not quotient.could_extract_minus_sign()


def or_equal(claim: sympy.Basic) -> sympy.Basic:
    """An order of sizes or strides that leaves open whether they are equal, where either way leads to the same."""
    loose = {sympy.StrictLessThan: sympy.Le, sympy.StrictGreaterThan: sympy.Ge}
    return loose.get(type(claim), type(claim))(*claim.args)
