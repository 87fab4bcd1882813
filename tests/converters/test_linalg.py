import pytest
import torch
from harness import B, Call, S, case, check_case, compare, parametrize
from torch.utils._pytree import tree_map_only

from torch2rt import TraceError, torch2rt

Tensor, aten, linalg = torch.Tensor, torch.ops.aten, torch.linalg
FAR = {"rtol": 1e-3, "atol": 1e-3}  # elements of random matrices' inverses differ by their condition


def definite(function, *args, id=None, **kwargs):
    """A function of matrices that are positive definite."""

    def call(x, *rest):
        eye = torch.eye(x.shape[-1], device=x.device)
        return function((x.unsqueeze(-1) * x.unsqueeze(-2)).sum(-3) + eye, *rest, *args, **kwargs)

    call.__name__ = id or f"{function.__name__}{args}{kwargs}".replace(" ", "")
    return call


def well(x):
    """A matrix whose rows have to be exchanged, and which is not close to a singular one."""
    return torch.eye(x.shape[-1], device=x.device).flip(0) * 3 + x.sin()


def regular(function, *args, **kwargs):
    """A function of such matrices."""

    def call(x, *rest):
        return function(well(x), *rest, *args, **kwargs)

    call.__name__ = f"{function.__name__}{args}{kwargs}".replace(" ", "")
    return call


def first_of(function, count):
    """The first results of an operator, whose others are for gradients."""

    def call(*args):
        return function(*args)[:count]

    call.__name__ = str(function)
    return call


CASES = [
    *[case(regular(f), [(B, 3, 3)], rtol=1e-3) for f in (linalg.det, linalg.inv, linalg.slogdet)],
    case(regular(first_of(aten._linalg_det, 1)), [(B, 3, 3)], rtol=1e-3),
    case(regular(first_of(aten._linalg_slogdet, 2)), [(B, 3, 3)], rtol=1e-3),
    case(regular(first_of(aten._linalg_solve_ex, 1)), [(B, 3, 3), (B, 3, S)], rtol=1e-3),
    *[case(regular(f), [(2, n, n)], rtol=1e-3, modes=("static",)) for f in (linalg.det, linalg.inv) for n in (1, 2, 5)],
    case(regular(torch.slogdet), [(B, 3, 3)], rtol=1e-3),
    *[case(f, [(4, 4)], **FAR, modes=("static",)) for f in (torch.det, Tensor.det, Tensor.slogdet)],
    *[case(regular(f), [(2, B, 3, 3)], rtol=1e-3) for f in (linalg.inv_ex, Tensor.logdet)],
    *[case(regular(f), [(3, 3)], rtol=1e-3) for f in (torch.inverse, Tensor.inverse)],
    case(
        lambda x: [linalg.det(A=x), torch.det(input=x), linalg.inv(A=well(x)), torch.inverse(input=well(x))],
        [(3, 3)],
        **FAR,
        modes=("static",),
        id="by-name",
    ),
    case(lambda x: torch.logdet(x), [(64, 2, 2)], **FAR, id="logdet-of-any-sign"),
    case(regular(linalg.slogdet), [(16, 16)], modes=("static",)),
    case(lambda x: linalg.slogdet(x).logabsdet, [(B, 3, 3)], **FAR, id="logabsdet"),
    case(regular(linalg.solve), [(B, 3, 3), (B, 3, S)], rtol=1e-3),
    case(regular(linalg.solve), [(B, 3, 3), (B, 3)], rtol=1e-3),
    case(regular(linalg.solve), [(B, 3, 3), (3,)], rtol=1e-3, modes=("static",)),
    case(regular(linalg.solve), [(3, 3), (B, 3, 2)], rtol=1e-3),
    case(regular(linalg.solve), [(B, 1, 3, 3), (4, 3, 2)], rtol=1e-3, modes=("static",)),
    case(regular(linalg.solve, left=False), [(B, 3, 3), (B, 2, 3)], rtol=1e-3, modes=("static",)),
    case(regular(linalg.solve_ex), [(B, 4, 4), (B, 4, 2)], rtol=1e-3),
    *[case(regular(linalg.matrix_power, n), [(B, 3, 3)], rtol=1e-3) for n in (-3, 2)],
    case(regular(Tensor.matrix_power, -2), [(3, 3)], rtol=1e-3),
    *[case(definite(linalg.cholesky, upper=u), [(B, n, n)]) for n in (1, 3) for u in (False, True)],
    case(definite(linalg.cholesky_ex), [(2, B, 3, 3)]),
    # only one triangle is looked at
    case(definite(lambda x: linalg.cholesky(x.tril()), id="cholesky-lower"), [(B, 3, 3)]),
    case(definite(lambda x: linalg.cholesky(x.triu(), upper=True), id="cholesky-upper"), [(B, 3, 3)]),
    *[
        case(
            regular(linalg.solve_triangular, upper=upper, left=left, unitriangular=unit),
            [(B, 3, 3), (B, 3, S) if left else (B, S, 3)],
            rtol=1e-3,
            modes=("dynamic",) if unit else ("static",),
        )
        for upper in (False, True)
        for left in (False, True)
        for unit in (False, True)
    ],
    case(regular(linalg.solve_triangular, upper=True), [(3, 3), (B, 3, 2)], rtol=1e-3),
    *[
        case(
            lambda b, a, t=t, **kwargs: torch.triangular_solve(b, 3 + a.cos(), transpose=t, **kwargs),
            [(B, 3, 2), (B, 3, 3)],
            id=f"triangular_solve-{t}{kwargs}",
            rtol=1e-3,
            modes=("static",) if t else ("dynamic",),
            **kwargs,
        )
        for t in (False, True)
        for kwargs in ({}, {"upper": False}, {"unitriangular": True})
    ],
    *[
        case(
            lambda b, a, upper=upper: torch.cholesky_solve(b, 3 + a.cos(), upper=upper),
            [(B, 3, 2), (B, 3, 3)],
            id=f"cholesky_solve-{upper}",
            rtol=1e-3,
        )
        for upper in (False, True)
    ],
    case(lambda a: torch.cholesky_inverse(3 + a.cos(), True), [(B, 3, 3)], id="cholesky_inverse", rtol=1e-3),
    case(lambda x: linalg.tensorinv(well(x.mean(0)).reshape(6, 3, 2), 1), [(B, 6, 6)], id="tensorinv", rtol=1e-3),
    case(
        lambda x, y: linalg.tensorsolve(well(x.mean(0)).reshape(2, 3, 6), y),
        [(B, 6, 6), (2, 3)],
        id="tensorsolve",
        rtol=1e-3,
    ),
    case(
        lambda x, y: linalg.tensorsolve(well(x).reshape(2, 6, 3), y, (0, 2)),
        [(6, 6), (6,)],
        id="tensorsolve-dims",
        rtol=1e-3,
    ),
    # what models do with them
    case(
        lambda points, pose: points @ linalg.inv(torch.eye(4, device=pose.device) * 2 + pose.tanh() / 4).mT,
        [(B, S, 4), (B, 4, 4)],
        id="into-camera",
        rtol=1e-3,
    ),
]


@parametrize(CASES)
@pytest.mark.filterwarnings("ignore:.*triangular_solve is deprecated")
def test_linalg(row, mode, device):
    check_case(row, mode, device)


def run(function, x, verify=True):
    model_trt = torch2rt(Call(function), [x], verify=verify)
    return (model_trt if x.device.type == "cuda" else model_trt.reference())(x)


def test_accuracy(device):
    """Pivots are chosen as torch chooses them, without which the second of these would be lost."""
    torch.manual_seed(0)
    x = torch.stack([torch.randn(8, 8), torch.randn(8, 8)]).to(device)
    x[1, 0, 0] = 1e-7
    exact = torch.linalg.inv(x.double().cpu())
    for actual in (torch.linalg.inv(x), run(torch.linalg.inv, x)):
        assert ((actual.double().cpu() - exact).abs().amax((1, 2)) < 2e-5 * exact.abs().amax((1, 2))).all()


def test_singular_matrices(device):
    """As on the CPU: of what is zero but for rounding, torch's CUDA libraries make something else.

    The first has a column of zeros: of two equal rows, some processors' libraries leave a rounding error.
    """
    x = torch.tensor([[1.0, 2, 0], [2, 5, 0], [0, 1, 0]])
    x = torch.stack([x, torch.zeros_like(x), torch.ones_like(x), torch.eye(3)])
    for function in (linalg.det, linalg.slogdet, torch.logdet):
        compare(run(function, x.to(device)), tree_map_only(torch.Tensor, lambda t: t.to(device), function(x)))
    inverse, info = run(linalg.inv_ex, x.to(device), verify=False)  # torch says nothing of a singular one's inverse
    assert info.tolist() == [3, 1, 2, 0] and not inverse[:3].isfinite().all(-1).all(-1).any()
    compare(inverse[3], torch.eye(3, device=device))


def test_a_matrix_that_is_not_definite(device):
    x = torch.tensor([[2.0, 0, 0], [0, -1, 0], [0, 0, 1]], device=device)
    x = torch.stack([x, torch.eye(3, device=device)])
    factor, info = run(linalg.cholesky_ex, x, verify=False)  # torch leaves numbers there that mean nothing
    assert info.tolist() == [2, 0] and factor[0].isnan().any()
    compare(factor[1], torch.eye(3, device=device))


ERRORS = [
    (linalg.inv, (2, 17, 17), "matrices of up to 16 x 16 are solved, of a static size"),
    (linalg.cholesky, (17, 17), "matrices of up to 16 x 16"),
    (linalg.det, (3, 4), "not square"),
    (lambda x: linalg.solve(x, x[:, :2]), (2, 3, 3), "not as high as the matrices"),
    (lambda x: linalg.solve(x, x[0, 0], left=False), (2, 3, 3), "takes no vectors"),
    (lambda x: linalg.inv_ex(x, check_errors=True), (2, 3, 3), "an engine raises nothing"),
    (lambda x: linalg.cholesky_ex(x, check_errors=True), (2, 3, 3), "an engine raises nothing"),
    (lambda x: linalg.inv(x.half()), (2, 3, 3), "matrices of float32"),
]


@pytest.mark.parametrize(("function", "shape", "message"), ERRORS)
def test_refused(function, shape, message):
    with pytest.raises(TraceError, match=message):
        torch2rt(Call(function), [torch.randn(shape)])


def test_a_dynamic_size_is_refused():
    with pytest.raises(TraceError, match="of a static size"):
        torch2rt(Call(linalg.inv), [torch.randn(3, 3)], min_shapes=[(2, 2)], max_shapes=[(4, 4)])
