from contextlib import ExitStack

from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from torch2rt.vocabulary import (
    Context,
    check,
    composite,
    converter,
    has_dynamic_while,
    is_traced,
    materialize,
    reshape,
    run,
    scope,
    select,
    subgraph,
    torch,
    trt,
)

# torch.cond -----------------------------------------------------------------------------------------------------------


@composite(torch.ops.higher_order.cond)
def cond(pred, true_fn, false_fn, operands=()):
    """Both branches are recorded, and a call that chooses between their results."""
    if not is_traced(pred):
        return (true_fn if pred else false_fn)(*operands)
    with scope():
        results = [pytree.tree_flatten(branch(*operands)) for branch in (true_fn, false_fn)]
    (then, structure), (other, other_structure) = results
    check(structure == other_structure and alike(then, other), "the branches return unlike tensors")
    with ExitStack() as stack:
        for device in {x.device.type for x in (pred, *then, *other) if isinstance(x, torch.Tensor)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        return pytree.tree_unflatten(choose(pred, then, other), structure)


def alike(ours, theirs):
    """Whether these are tensors of the same types and sizes."""
    return len(ours) == len(theirs) and all(
        isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        for a, b in zip(ours, theirs)
    )


def choose(pred, then, other):
    """The results of one branch, as one recorded call."""
    tensors = (pred, *then, *other) if isinstance(pred, torch.Tensor) else (*then, *other)
    if has_torch_function(tensors):
        return handle_torch_function(choose, tensors, pred, then, other)
    return [x.clone() for x in (then if is_traced(pred) or pred else other)]


@converter(choose)
def choose_branch(ctx: Context, pred, then, other):
    """Both branches run: an If runs one alone only if its tensors come through If inputs, and to those TensorRT for RTX
    1.6 gives the sizes of an earlier call."""
    pred = reshape(ctx, materialize(ctx, pred, torch.bool), ())
    return [select(ctx, pred, a, b) for a, b in zip(then, other, strict=True)]


# torch.while_loop -----------------------------------------------------------------------------------------------------


@composite(torch.ops.higher_order.while_loop)
def while_loop(cond_fn, body_fn, carried_inputs, additional_inputs=()):
    """The test and the body become graphs of their own, run by one recorded call."""
    carried, structure = pytree.tree_flatten(carried_inputs)
    check(all(isinstance(x, torch.Tensor) for x in carried), "it carries a number; make it a 0-d tensor")
    nested = lambda f: lambda *leaves: f(*pytree.tree_unflatten(leaves, structure), *additional_inputs)  # noqa: E731
    test, body = (subgraph(nested(function), carried) for function in (cond_fn, body_fn))
    (proceed,) = test.results if len(test.results) == 1 else (None,)
    check(proceed is not None and proceed.dtype is torch.bool and proceed.dim() == 0, "its test is no 0-d bool tensor")
    check(alike(carried, body.results), "its body returns tensors unlike those that it is given")
    results = run(loop, test.graph, test.captured, body.graph, body.captured, carried, like=carried)
    return pytree.tree_unflatten(results, body.structure)


def loop(test, test_captured, body, body_captured, carried):
    """What the recorded call does."""
    while test(*carried, *test_captured)[0]:
        carried = body(*carried, *body_captured)
    return [x.clone() for x in carried]


@converter(loop, limits="static shapes only, on TensorRT for RTX")
def loop_layers(ctx: Context, test, test_captured, body, body_captured, carried):
    check(
        not ctx.symbols or has_dynamic_while(),
        "TensorRT for RTX runs a loop that a condition ends wrongly in an engine with dynamic shapes. Convert it with "
        "static shapes, or loop outside of the engine",
    )
    layers = ctx.network.add_loop()
    recurrences = [layers.add_recurrence(materialize(ctx, x)) for x in carried]
    state = [ctx.track(r.get_output(0), out.shape) for r, out in zip(recurrences, ctx.out, strict=True)]
    (proceed,) = ctx.inline(test, *state, *test_captured)
    layers.add_trip_limit(materialize(ctx, proceed), trt.TripLimit.WHILE)
    for recurrence, value in zip(recurrences, ctx.inline(body, *state, *body_captured), strict=True):
        recurrence.set_input(1, materialize(ctx, value))
    return [layers.add_loop_output(x, trt.LoopOutput.LAST_VALUE).get_output(0) for x in state]
