from contextlib import ExitStack

from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from torch2rt.vocabulary import (
    check,
    composite,
    converter,
    is_traced,
    materialize,
    refuse,
    reshape,
    select,
    torch,
)


@composite(torch.ops.higher_order.while_loop)
def while_loop(cond_fn, body_fn, carried_inputs, additional_inputs):
    refuse("a loop whose length depends on data is not converted. Convert its body, and loop outside of the engine")


@composite(torch.ops.higher_order.cond)
def cond(pred, true_fn, false_fn, operands=()):
    """Both branches are recorded, and a call that chooses between their results."""
    if not is_traced(pred):
        return (true_fn if pred else false_fn)(*operands)
    tensors = [x for x in pytree.tree_leaves(operands) if isinstance(x, torch.Tensor)]
    before = [x._version for x in tensors]
    results = [pytree.tree_flatten(branch(*operands)) for branch in (true_fn, false_fn)]
    check([x._version for x in tensors] == before, "a branch writes to its operands; let it return the new value")
    (then, structure), (other, other_structure) = results
    alike = all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(then, other))
    check(structure == other_structure and alike, "the branches return unlike tensors")
    with ExitStack() as stack:
        for device in {x.device.type for x in (pred, *then, *other) if isinstance(x, torch.Tensor)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return pytree.tree_unflatten(choose(pred, then, other), structure)


def choose(pred, then, other):
    """The results of one branch, as one recorded call."""
    tensors = (pred, *then, *other) if isinstance(pred, torch.Tensor) else (*then, *other)
    if has_torch_function(tensors):
        return handle_torch_function(choose, tensors, pred, then, other)
    return [x.clone() for x in (then if is_traced(pred) or pred else other)]


@converter(choose)
def choose_branch(ctx, pred, then, other):
    """Both branches run: an If runs one alone only if its tensors come through If inputs, and to those TensorRT for RTX
    1.6 gives the sizes of an earlier call."""
    pred = reshape(ctx, materialize(ctx, pred, torch.bool), ())
    return [select(ctx, pred, a, b) for a, b in zip(then, other, strict=True)]
