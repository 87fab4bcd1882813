from contextlib import ExitStack

from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from torch2rt.vocabulary import (
    cast,
    check,
    composite,
    converter,
    dims,
    is_traced,
    materialize,
    refuse,
    reshape,
    torch,
)


@composite(torch.ops.higher_order.while_loop)
def while_loop(cond_fn, body_fn, carried_inputs, additional_inputs):
    refuse("a loop whose length depends on data is not converted. Convert its body, and loop outside of the engine")


@composite(torch.ops.higher_order.cond)
def cond(pred, true_fn, false_fn, operands=()):
    """Both branches are recorded, between a call that says where they begin and one that chooses what comes out."""
    if not is_traced(pred):
        return (true_fn if pred else false_fn)(*operands)
    leaves, structure = pytree.tree_flatten(tuple(operands))
    inside = iter(as_it_is(begin, pred, [x for x in leaves if is_traced(x)]))
    operands = pytree.tree_unflatten([next(inside) if is_traced(x) else x for x in leaves], structure)
    results = [pytree.tree_flatten(branch(*operands)) for branch in (true_fn, false_fn)]
    inputs = [x for x in pytree.tree_leaves(operands) if is_traced(x)]
    check(not any(x._version for x in inputs), "a branch writes to its operands; let it return the new value")
    (then, structure), (other, other_structure) = results
    alike = all(a.dtype == b.dtype and a.shape == b.shape for a, b in zip(then, other))
    check(structure == other_structure and alike, "the branches return unlike tensors")
    return pytree.tree_unflatten(as_it_is(choose, pred, inputs, then, other), structure)


def as_it_is(function, *args):
    """A call that autocast leaves alone."""
    with ExitStack() as stack:
        for device in {x.device.type for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return function(*args)


def begin(pred, operands):
    """What a conditional's branches see of their operands."""
    if has_torch_function(operands):
        return handle_torch_function(begin, operands, pred, operands)
    return [x.clone() for x in operands]


def choose(pred, operands, then, other):
    """The results of one branch of the conditional that began with these operands."""
    if has_torch_function((*operands, *then, *other)):
        return handle_torch_function(choose, (*operands, *then, *other), pred, operands, then, other)
    return [x.clone() for x in (then if is_traced(pred) or pred else other)]


@converter(begin)
def begin_conditional(ctx, pred, operands):
    conditional = conditional_on(ctx, pred)
    layers = [conditional.add_input(materialize(ctx, x)) for x in operands]
    inside = [ctx.track(layer.get_output(0), dims(ctx, x)) for layer, x in zip(layers, operands, strict=True)]
    ctx.memo["conditional", id(inside[0])] = conditional
    return inside


@converter(choose)
def choose_branch(ctx, pred, operands, then, other):
    conditional = ctx.memo["conditional", id(operands[0])] if operands else conditional_on(ctx, pred)
    pairs = [[materialize(ctx, x) for x in pair] for pair in zip(then, other, strict=True)]
    return [ctx.track(conditional.add_output(a, b).get_output(0), dims(ctx, a)) for a, b in pairs]


def conditional_on(ctx, pred):
    conditional = ctx.network.add_if_conditional()
    conditional.set_condition(reshape(ctx, cast(ctx, pred, torch.bool), ()))
    return conditional
