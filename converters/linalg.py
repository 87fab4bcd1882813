"""Systems of a few equations, solved step by step: an engine has no loop over columns that would serve any number.

An engine raises nothing: where a matrix is singular or not positive definite, the result has infinities and NaNs.
"""

import math

from torch2rt.vocabulary import Context, check, composite, converter, is_symbolic, same_size, torch

Tensor, aten, linalg, types = torch.Tensor, torch.ops.aten, torch.linalg, torch.return_types
LIMIT = 16


def size_of(A):
    """The number of equations, if they can be solved here."""
    n = A.shape[-1]
    small = not is_symbolic(n) and n <= LIMIT
    check(small, f"matrices of up to {LIMIT} x {LIMIT} are solved, of a static size; compute it outside the module")
    check(A.dtype is torch.float32, "matrices of float32 are solved")
    check(n > 0, "the matrices are empty")
    check(same_size(A.shape[-2], n), "the matrices are not square")
    return n


# General matrices ----------------------------------------------------------------------------------------------------


def eliminated(A, B=None):
    """Gauss and Jordan's elimination, in each column by the largest of the rows that are left: these pivots, and the
    solutions for the right sides B. Without any, the rows that were chosen, and a pivot of 0 passes."""
    n, pivots, chosen, used = size_of(A), [], [], None
    rows = torch.arange(n, device=A.device).unsqueeze(-1)
    for k in range(n):
        column, A = A[..., :1], A[..., 1:]
        size = column.abs() if used is None else torch.where(used, -1.0, column.abs())
        row = size.argmax(-2, keepdim=True)
        here = rows == row
        used = here if used is None else used | here
        pivot = torch.where(here, column, 0.0).sum(-2, keepdim=True)
        factor = column / (torch.where(pivot == 0, 1.0, pivot) if B is None else pivot)
        A = reduced(A, here, pivot, factor) if k + 1 < n else A
        B = None if B is None else reduced(B, here, pivot, factor)
        pivots.append(pivot.squeeze(-1))
        chosen.append(row.squeeze(-1))
    pivot, order = torch.cat(pivots, -1), torch.cat(chosen, -1)
    if B is None:
        return pivot, order
    return pivot, B.take_along_dim(order[(None,) * (B.dim() - order.dim() - 1) + (..., None)], -2)


def reduced(x, here, pivot, factor):
    """One row divided by its pivot, and taken from the others so often that their column vanishes."""
    row = torch.where(here, x, 0.0).sum(-2, keepdim=True)
    return torch.where(here, row / pivot, x - factor * row)


def sign_and_pivots(A):
    """The sign of the order in which rows were chosen, by the pairs that are out of order; and the pivots."""
    pivots, order = eliminated(A)
    later = torch.ones(A.shape[-1:] * 2, dtype=torch.bool, device=A.device).triu()
    swaps = (order.unsqueeze(-1) > order.unsqueeze(-2)) & later
    return 1.0 - 2.0 * (swaps.sum((-2, -1)) % 2).float(), pivots


@composite(linalg.det, torch.det, Tensor.det)
def det(input):
    sign, pivots = sign_and_pivots(input)
    return sign * pivots.prod(-1)


@composite(aten._linalg_det)
def det_and_factors(A):
    """The factors that torch finds it with are for gradients."""
    return linalg.det(A), *aten._linalg_det(A)[1:]


@composite(aten._linalg_slogdet)
def slogdet_and_factors(A):
    return *linalg.slogdet(A), *aten._linalg_slogdet(A)[2:]


@composite(aten._linalg_solve_ex)
def solve_ex_and_factors(A, B, *, left=True, check_errors=False):
    result, info = linalg.solve_ex(A, B, left=left, check_errors=check_errors)
    factors, pivots, _ = aten._linalg_solve_ex(A, B, left=left)[1:]
    return result, factors, pivots, info


@converter(aten._linalg_det, aten._linalg_slogdet, aten._linalg_solve_ex, limits="not the factors")
def no_factors(ctx: Context, *args, **kwargs):
    return (None,) * len(ctx.out)


@composite(linalg.slogdet)
def slogdet(A):
    sign, pivots = sign_and_pivots(A)
    return types.linalg_slogdet((sign * pivots.sign().prod(-1), pivots.abs().log().sum(-1)))


@composite(torch.slogdet, Tensor.slogdet)
def slogdet_of_old(input):
    return types.slogdet(linalg.slogdet(input))


@composite(torch.logdet, Tensor.logdet)
def logdet(input):
    check(not input.is_complex(), "the determinant of complex matrices")
    sign, size = linalg.slogdet(input)
    return torch.where(sign < 0, math.nan, size)


def solved(A, B, left):
    """The solution of A X = B or of X A = B, and where a pivot was 0."""
    if not left:
        X, info = solved(A.mT, B.mT, True)
        return X.mT, info
    check(same_size(A.shape[-1], B.shape[-2]), "the right sides are not as high as the matrices")
    pivots, X = eliminated(A, B)
    zero = pivots == 0
    return X, torch.where(zero.any(-1), zero.int().argmax(-1) + 1, 0).int()


@composite(linalg.inv_ex)
def inv_ex(A, *, check_errors=False):
    check(not check_errors, "check_errors=True: an engine raises nothing")
    eye = torch.eye(size_of(A), device=A.device)
    return types.linalg_inv_ex(solved(A, eye, True))


@composite(linalg.inv, torch.inverse, Tensor.inverse)
def inv(input):
    return linalg.inv_ex(input)[0]


@composite(linalg.solve_ex)
def solve_ex(A, B, *, left=True, check_errors=False):
    check(not check_errors, "check_errors=True: an engine raises nothing")
    vectors = B.dim() == 1 or B.shape == A.shape[:-1]
    check(left or not vectors, "left=False takes no vectors")
    result, info = solved(A, B.unsqueeze(-1) if vectors else B, left)
    return types.linalg_solve_ex((result.squeeze(-1) if vectors else result, info))


@composite(linalg.solve)
def solve(A, B, *, left=True):
    return linalg.solve_ex(A, B, left=left)[0]


@composite(linalg.tensorinv)
def tensorinv(input, ind=2):
    rows = math.prod(input.shape[:ind])
    return linalg.inv(input.reshape(rows, -1)).reshape(*input.shape[ind:], *input.shape[:ind])


@composite(linalg.tensorsolve)
def tensorsolve(input, other, dims=None):
    x = input if dims is None else input.movedim(tuple(dims), tuple(range(input.dim() - len(dims), input.dim())))
    shape = x.shape[other.dim() :]
    return linalg.solve(x.reshape(-1, math.prod(shape)), other.flatten()).reshape(shape)


@composite(linalg.matrix_power, torch.matrix_power, Tensor.matrix_power)
def matrix_power(input, n):
    return linalg.matrix_power(linalg.inv(input), -n) if n < 0 else NotImplemented


# Triangles -----------------------------------------------------------------------------------------------------------


@composite(linalg.solve_triangular)
def solve_triangular(A, B, *, upper, left=True, unitriangular=False):
    return substituted(A, B, upper, unitriangular) if left else substituted(A.mT, B.mT, not upper, unitriangular).mT


def substituted(A, B, upper, unitriangular=False):
    """Row by row, each taken from those that wait; what lies beyond the triangle meets only rows that are done."""
    n = size_of(A)
    check(same_size(B.shape[-2], n), "the right sides are not as high as the matrices")
    rows = {}
    for i in reversed(range(n)) if upper else range(n):
        row = B[..., i : i + 1, :]
        rows[i] = row if unitriangular else row / A[..., i : i + 1, i : i + 1]
        B = B - A[..., i : i + 1] * rows[i]
    return torch.cat([rows[i] for i in range(n)], -2)


@composite(torch.triangular_solve, Tensor.triangular_solve)
def triangular_solve(input, A, upper=True, transpose=False, unitriangular=False):
    solution = substituted(A.mT if transpose else A, input, upper != transpose, unitriangular)
    return types.triangular_solve((solution, A.clone()))


@composite(linalg.cholesky_ex)
def cholesky_ex(A, *, upper=False, check_errors=False):
    """Column by column, each taken from the matrix as the product with itself; the other triangle is not looked at."""
    check(not check_errors, "check_errors=True: an engine raises nothing")
    A = A.mT if upper else A
    n = size_of(A)
    rows, columns, pivots = torch.arange(n, device=A.device), [], []
    for i in range(n):
        pivot = A[..., i, i : i + 1]
        column = torch.where(rows < i, 0.0, A[..., i] / pivot.sqrt())
        A = A - column.unsqueeze(-1) * column.unsqueeze(-2)
        columns.append(column)
        pivots.append(pivot)
    failed = ~(torch.cat(pivots, -1) > 0)
    info = torch.where(failed.any(-1), failed.int().argmax(-1) + 1, 0).int()
    return types.linalg_cholesky_ex((torch.stack(columns, -2 if upper else -1), info))


@composite(linalg.cholesky)
def cholesky(A, *, upper=False):
    return linalg.cholesky_ex(A, upper=upper)[0]


@composite(torch.cholesky_solve, Tensor.cholesky_solve)
def cholesky_solve(input, input2, upper=False):
    """From L L^T, or from U^T U."""
    half = substituted(input2.mT if upper else input2, input, upper=False)
    return substituted(input2 if upper else input2.mT, half, upper=True)


@composite(torch.cholesky_inverse, Tensor.cholesky_inverse)
def cholesky_inverse(input, upper=False):
    return torch.cholesky_solve(torch.eye(size_of(input), device=input.device), input, upper)
