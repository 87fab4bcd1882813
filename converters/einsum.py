import math
import re
from string import ascii_lowercase, ascii_uppercase

from torch2rt.vocabulary import (
    Context,
    cast,
    composite,
    converter,
    dims,
    dtype_of,
    materialize,
    matmul,
    mul,
    permute,
    reduce,
    reshape,
    same_size,
    slice_nd,
    torch,
    trt,
    wide,
)

Reduce = trt.ReduceOperation


@composite(torch.einsum)
def einsum(*args):
    """Two operands at a time, from left to right, in explicit notation."""
    equation, *operands = args if isinstance(args[0], str) else from_sublists(*args)
    if isinstance(operands[0], (list, tuple)):
        operands = operands[0]
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        letters = re.sub("[^a-zA-Z]", "", inputs)
        once = "".join(letter for letter in sorted(set(letters)) if letters.count(letter) == 1)
        output = "..." * ("..." in inputs) + once
    term, *terms = inputs.split(",")
    result, *operands = operands
    if not operands:
        return torch.einsum(f"{term}->{output}", result)
    for i, operand in enumerate(operands):
        both, later = term + terms[i], output + "".join(terms[i + 1 :])
        letters = dict.fromkeys(both.replace("...", ""))
        kept = "..." * ("..." in both) + "".join(letter for letter in letters if letter in later)
        kept = kept if terms[i + 1 :] else output
        result, term = torch.einsum(f"{term},{terms[i]}->{kept}", result, operand), kept
    return result


def from_sublists(*args):
    """`einsum(a, [0, 1], b, [1, 2], [0, 2])` as an equation and its operands."""
    letters = ascii_uppercase + ascii_lowercase
    write = lambda sublist: "".join("..." if label is ... else letters[label] for label in sublist)  # noqa: E731
    pairs = len(args) // 2 * 2
    output = "->" + write(args[-1]) if len(args) > pairs else ""
    return [",".join(map(write, args[1:pairs:2])) + output, *args[:pairs:2]]


@converter(torch.einsum)
def einsum_of_two(ctx: Context, equation, *operands):
    """One matrix product. Labels are letters, or numbers from -k to -1 for what an ellipsis covers."""
    xs = [materialize(ctx, x, ctx.out.dtype) for x in operands]
    inputs, _, output = equation.partition("->")
    terms, ranks = inputs.split(","), [len(dims(ctx, x)) for x in xs]
    covered = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True)]
    output = spell(output, max(covered))
    parts = [diagonals(ctx, x, spell(term, n)) for x, term, n in zip(xs, terms, covered, strict=True)]
    result, labels = parts[0]
    if parts[1:]:
        result, labels = contract(ctx, result, labels, parts[1][0], parts[1][1], output)
    result, labels = sum_out(ctx, result, labels, [label for label in labels if label not in output])
    return permute(ctx, result, [labels.index(label) for label in output])


def spell(term, covered):
    before, dots, after = term.partition("...")
    return [*before, *(range(-covered, 0) if dots else ()), *after]


@converter(torch._VF.tensordot)
def tensordot(ctx: Context, a, b, dims_a, dims_b):
    a, b = (materialize(ctx, x, ctx.out.dtype) for x in (a, b))
    m, n = len(dims(ctx, a)), len(dims(ctx, b))
    first = list(range(m))
    second = list(range(m, m + n))
    for i, j in zip(dims_a, dims_b, strict=True):
        second[j] = first[i]
    shared = set(first) & set(second)
    return contract(ctx, a, first, b, second, [label for label in [*first, *second] if label not in shared])[0]


# Arithmetic on labelled tensors --------------------------------------------------------------------------------------


def sum_out(ctx: Context, x, labels, gone):
    """Add up along the dimensions with these labels."""
    if not gone:
        return x, labels
    dtype = dtype_of(x)
    total = reduce(ctx, Reduce.SUM, cast(ctx, x, wide(dtype)), [labels.index(label) for label in gone])
    return cast(ctx, total, dtype), [label for label in labels if label not in gone]


def diagonals(ctx: Context, x, labels):
    """A dimension for each label: of those that share one, the diagonal."""
    for label in dict.fromkeys(labels):
        while labels.count(label) > 1:
            i = labels.index(label)
            j = labels.index(label, i + 1)
            rest = [k for k in range(len(labels)) if k not in (i, j)]
            *sizes, n, _ = (dims(ctx, x)[k] for k in (*rest, i, j))
            flat = reshape(ctx, permute(ctx, x, [*rest, i, j]), (*sizes, n * n))
            x = slice_nd(ctx, flat, [0] * (len(rest) + 1), [*sizes, n], [*(1 for _ in sizes), n + 1])
            labels = [*(labels[k] for k in rest), label]
    return x, labels


def contract(ctx: Context, a, first, b, second, keep):
    """The product of two labelled tensors summed over the labels not in `keep`, and its labels."""
    size_a, size_b = (dict(zip(labels, dims(ctx, x))) for x, labels in ((a, first), (b, second)))
    single = lambda sizes, label: label not in sizes or same_size(sizes[label], 1)  # noqa: E731
    own = {n for n in {**size_a, **size_b} if single(size_a, n) != single(size_b, n)} | (size_a.keys() ^ size_b.keys())
    alone = own - {*keep}
    a, first = sum_out(ctx, a, first, [label for label in first if label in alone])
    b, second = sum_out(ctx, b, second, [label for label in second if label in alone])
    inner = [label for label in first if label in second and label not in keep]
    batch = [label for label in keep if label in first and label in second]
    rows = [label for label in keep if label in first and label not in second]
    columns = [label for label in keep if label in second and label not in first]
    if not inner or not dtype_of(a).is_floating_point:
        labels = [*(label for label in keep if label in first or label in second), *inner]
        product = mul(ctx, *(aligned(ctx, x, own, labels) for x, own in ((a, first), (b, second))))
        return sum_out(ctx, product, labels, inner)
    if rows and columns and keep.index(columns[0]) < keep.index(rows[0]):
        a, first, rows, b, second, columns = b, second, columns, a, first, rows
    left = matrices(ctx, a, first, batch, rows, inner)
    right = matrices(ctx, b, second, batch, columns, inner)
    sizes = {**size_a, **size_b}
    result = matmul(ctx, left[0], right[0], left[1], not right[1])
    shape = [*dims(ctx, result)[:-2], *(sizes[label] for label in (*rows, *columns))]
    return reshape(ctx, result, shape), [*batch, *rows, *columns]


def matrices(ctx: Context, x, labels, batch, rows, inner):
    """A tensor as matrices of what is kept by what is summed, or transposed where it lies so, and whether it is."""
    turned = labels == [*batch, *inner, *rows] and bool(rows)
    order = [batch, inner, rows] if turned else [batch, rows, inner]
    sizes = dict(zip(labels, dims(ctx, x)))
    x = permute(ctx, x, [labels.index(label) for part in order for label in part])
    shape = [*(sizes[label] for label in batch), *(math.prod(sizes[label] for label in part) for part in order[1:])]
    return reshape(ctx, x, shape), turned


def aligned(ctx: Context, x, own, labels):
    """A tensor with a dimension for each of the labels, of size 1 for those that are not its own."""
    sizes = dict(zip(own, dims(ctx, x)))
    x = permute(ctx, x, [own.index(label) for label in labels if label in own])
    return reshape(ctx, x, [sizes.get(label, 1) for label in labels])
