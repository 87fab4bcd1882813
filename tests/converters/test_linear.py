import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, Size, case, check_case, half, ints, parametrize

from torch2rt import TraceError, UnsupportedError, lower, torch2rt, trace
from torch2rt.backend.quirks import computes_squares_wrong, computes_vectors_wrong

M = Size("M", 26, 30, 40)


def bf16(*shape):
    return Data(shape, torch.bfloat16)


aten = torch.ops.aten
CASES = [
    *(case(aten._cdist_forward.default, [(B, 5, 4), (B, S, 4)], *how) for how in ((2.0, None), (2.0, 1), (3.0, 2))),
    case(aten.cdist.default, [(B, 5, 4), (B, S, 4)], compute_mode=1),
    case(torch._euclidean_dist, [(B, 5, 4), (B, S, 4)]),
    case(aten._pdist_forward.default, [(5, S)], 3.0),
    case(aten.pdist.default, [(5, S)]),
    case(aten._trilinear.default, [(B, 4), (5, 4, 3), (B, 3)], [1, 3], [0], [1, 2], [2, 3]),
    case(torch.nn.Bilinear(4, 3, 5), [(B, 2, 4), (B, 2, 3)], id="Bilinear"),
    case(F.linear, [(B, 3, 4), (7, 4), (7,)]),
    case(F.linear, [(B, 4), (7, 4)]),
    case(F.linear, [(4,), (7, 4), (7,)]),
    case(F.linear, [(B, 4), (4,)]),
    case(F.linear, [(4,), (4,), ()]),
    case(F.linear, [(B, S, 3, 4), (7, 4)], bias=None),
    case(F.linear, [half(B, 3, 4), half(7, 4), half(7)]),
    case(F.linear, [bf16(B, 4), bf16(7, 4), bf16(7)]),
    case(F.linear, [ints(B, 3, 4), ints(7, 4), ints(7)]),
    case(F.linear, [(0, 4), (7, 4), (7,)]),
    case(F.linear, [(B, 0), (7, 0), (7,)]),
    case(torch.nn.Linear(4, 7), [(B, S, 4)], id="Linear"),
    case(torch.nn.Linear(4, 7), [(4,)], id="Linear-1d"),
    case(torch.nn.Linear(4, 7, bias=False).half(), [half(B, 3, 4)], id="Linear-half"),
    case(torch.nn.Linear(4, 7).bfloat16(), [bf16(B, 4)], id="Linear-bfloat16"),
    case(torch.nn.Linear(4, 7), [(0, 4)], id="Linear-empty"),
    case(lambda x: torch.addmm(x.new_tensor([0.5, -1, 2]), x, x.new_ones(4, 3)), [(B, 4)], id="addmm-constants"),
    case(torch.matmul, [(4,), (4,)]),
    case(torch.matmul, [(S,), (S,)]),
    case(torch.matmul, [(4,), (4, 3)]),
    case(torch.matmul, [(B, 4), (4,)]),
    case(torch.matmul, [(B, 4), (4, S)]),
    case(torch.matmul, [(4,), (B, 4, 3)]),
    case(torch.matmul, [(B, 3, 4), (4,)]),
    case(torch.matmul, [(B, 3, S), (S, 5)]),
    case(torch.matmul, [(3, S), (B, S, 5)]),
    case(torch.matmul, [(B, 1, 3, 4), (6, 4, 5)]),
    case(torch.matmul, [(B, 3, 4), (B, 4, 5)]),
    case(torch.matmul, [(4,), (B, 2, 4, 3)]),
    case(torch.matmul, [(2, B, 3, 2, 4), (B, 1, 4, S)]),
    case(torch.matmul, [half(B, 3, 64), half(64, 5)]),
    case(torch.matmul, [bf16(B, 3, 4), bf16(B, 4, 5)]),
    case(torch.matmul, [ints(B, 3, 4), ints(4, 5)]),
    case(torch.matmul, [ints(B, 3, 4, dtype=torch.int32), ints(4, dtype=torch.int32)]),
    case(torch.matmul, [ints(4), ints(4)]),
    case(torch.matmul, [(B, 0), (0, 3)]),
    case(torch.Tensor.matmul, [(B, 3, 4), (4, 5)]),
    case(torch.Tensor.__matmul__, [(B, 3, 4), (4, 5)]),
    case(torch.Tensor.__rmatmul__, [(4, 5), (B, 3, 4)]),
    case(torch.linalg.matmul, [(B, 3, 4), (4, 5)]),
    case(lambda x: x @ x.mT @ x.new_ones(3, 5), [(B, 3, S)], id="operators"),
    case(lambda x: x.new_ones(2, 4) @ x, [(4, S)], id="constant-left"),
    case(lambda x: x @ torch.arange(4.0, device=x.device), [(B, 3, 4)], id="constant-vector"),
    case(torch.mm, [(B, 4), (4, 3)]),
    case(torch.Tensor.mm, [ints(B, 4), ints(4, 3)]),
    case(torch.bmm, [(B, 3, S), (B, S, 5)]),
    case(torch.Tensor.bmm, [half(B, 3, 4), half(B, 4, 5)]),
    case(torch.mv, [(B, S), (S,)]),
    case(torch.Tensor.mv, [(B, 4), (4,)]),
    case(torch.dot, [(S,), (S,)]),
    case(torch.Tensor.dot, [ints(5), ints(5)]),
    case(torch.vdot, [(S,), (S,)]),
    case(torch.Tensor.vdot, [(5,), (5,)]),
    case(torch.inner, [(B, 3, 4), (5, 2, 4)]),
    case(torch.inner, [(S,), (S,)]),
    case(torch.inner, [(B, 4), (4,)]),
    case(torch.inner, [(B, 4), ()]),
    case(torch.Tensor.inner, [(4,), (B, 4)]),
    case(torch.outer, [(B,), (S,)]),
    case(torch.outer, [ints(B), (4,)]),
    case(torch.ger, [half(3), half(S)]),
    case(torch.Tensor.outer, [(3,), (B,)]),
    case(torch.linalg.vecdot, [(B, 3, S), (3, S)]),
    case(torch.linalg.vecdot, [half(B, 64, 3), half(B, 64, 3)], dim=1),
    case(torch.addmm, [(3,), (B, 4), (4, 3)], beta=0.5, alpha=2.5),
    case(torch.addmm, [(B, 3), (B, 4), (4, 3)], alpha=0.25),
    case(torch.addmm, [(), (B, 4), (4, 3)]),
    case(torch.addmm, [half(3), half(B, 4), half(4, 3)], beta=2),
    case(torch.addmm, [ints(3), ints(B, 4), ints(4, 3)], beta=-2, alpha=3),
    case(torch.addmm, [ints(3), ints(B, 4), ints(4, 3)], alpha=0),
    case(lambda x, a, b: torch.addmm(x * torch.nan, a, b, beta=0), [(3,), (B, 4), (4, 3)], id="addmm-beta-0"),
    case(lambda x, a, b: x.clone().addmm_(a, b, alpha=3), [(B, 3), (B, 4), (4, 3)], id="addmm_"),
    case(torch.Tensor.addmm, [(3,), (B, 4), (4, 3)], beta=0.5),
    case(torch.addmv, [(B,), (B, S), (S,)], beta=3, alpha=-0.5),
    case(torch.Tensor.addmv, [(1,), (B, 4), (4,)]),
    case(torch.baddbmm, [(B, 1, 5), (B, 3, 4), (B, 4, 5)], beta=0.5, alpha=2),
    case(torch.baddbmm, [half(1), half(B, 3, 64), half(B, 64, 5)], beta=0, alpha=0.125),
    case(
        lambda x, a, b: torch.baddbmm(x, a, b, alpha=a.shape[1] * 0.125, beta=b.shape[0]),
        [(B, 1, 5), (B, S, 4), (B, 4, 5)],
        id="baddbmm-symbolic",
    ),
    case(torch.Tensor.baddbmm, [(5,), (B, 3, S), (B, S, 5)]),
    case(torch.addbmm, [(3, 5), (B, 3, S), (B, S, 5)], beta=0.5, alpha=2),
    case(torch.Tensor.addbmm, [(5,), (B, 3, 4), (B, 4, 5)]),
    case(torch.addr, [(B, S), (B,), (S,)], beta=0.5, alpha=2),
    case(torch.Tensor.addr, [(3, 5), (3,), (5,)]),
    case(torch.addr, [ints(5), ints(B), ints(5)], alpha=2),
    case(lambda *t: torch.linalg.multi_dot(t), [(B, 3), (3, 4), (4, S), (S, 2)], id="multi_dot"),
    case(lambda *t: torch.linalg.multi_dot(t), [(3,), (3, 4), (4,)], id="multi_dot-vectors"),
    case(torch.chain_matmul, [(B, 3), (3, 4), (4, S)]),
    case(torch.kron, [(B, 3), (2, S)]),
    case(torch.kron, [(2, B, 3), (5,)]),
    case(torch.Tensor.kron, [ints(3), (B, 2)]),
    case(torch.kron, [(B,), ()]),
    case(F.bilinear, [(B, S, 3), (B, S, 4), (5, 3, 4), (5,)]),
    case(F.bilinear, [(3,), (4,), (5, 3, 4)]),
    case(torch.nn.Bilinear(3, 4, 5), [(B, 3), (B, 4)], id="Bilinear"),
    case(torch.trace, [(B, 4)]),
    case(torch.trace, [(S, 3)]),
    case(torch.trace, [ints(3, 5, dtype=torch.int32)]),
    case(torch.Tensor.trace, [(3, 5)]),
    case(torch.linalg.cross, [(B, 3), (1, 3)]),
    case(torch.linalg.cross, [(B, 3, S), (B, 3, S)], dim=1),
    case(torch.cross, [(B, 5, 3), (B, 5, 3)], dim=2),
    case(F.cosine_similarity, [(B, 3, S), (B, 3, S)]),
    case(F.cosine_similarity, [(B, 3, 5), (5,)], dim=-1, eps=2.0),
    case(F.cosine_similarity, [half(B, 64), half(B, 64)]),
    case(F.cosine_similarity, [(1, B, 3), (4, 1, 3)], dim=-2),
    case(F.cosine_similarity, [(B, 1, 3), (S, 1)], dim=1),
    case(F.cosine_similarity, [(B, 3, 1), (5,)], -1),
    case(F.cosine_similarity, [(), ()], dim=0),
    *[case(F.pdist, [(5, S)], p) for p in (2.0, 1.0, 0.0, 3.0, float("inf"))],
    case(F.pdist, [(4, 2)]),
    case(F.pdist, [(1, 3)]),
    case(torch.nn.CosineSimilarity(dim=2), [(B, 3, 5), (B, 1, 5)], id="CosineSimilarity"),
    case(F.pairwise_distance, [(B, S), (B, S)]),
    case(F.pairwise_distance, [(B, 5), (5,)], p=3.5, eps=0.5, keepdim=True),
    case(F.pairwise_distance, [(B, 5), (B, 5)], 1),
    case(F.pairwise_distance, [half(B, 5), half(B, 5)], float("inf")),
    case(torch.nn.PairwiseDistance(p=float("-inf")), [(B, 5), (B, 5)], id="PairwiseDistance"),
    case(torch.cdist, [(B, S, 3), (B, 5, 3)]),
    case(torch.cdist, [(B, 3), (5, 3)], p=1),
    case(torch.cdist, [(2, 1, S, 3), (B, 5, 3)], 2.5),
    case(torch.cdist, [(B, 4, 3), (B, 5, 3)], p=float("inf")),
    case(torch.cdist, [(B, 4, 3), (B, 5, 3)], p=0.0),
    case(torch.cdist, [(B, M, 3), (B, 5, 3)], rtol=1e-3),  # cancels: torch multiplies matrices too
    case(torch.cdist, [(B, 4, 3), (B, 5, 3)], 2, "use_mm_for_euclid_dist"),
    case(torch.cdist, [(B, M, 3), (B, 5, 3)], 2, "donot_use_mm_for_euclid_dist"),
    case(lambda x: torch.cdist(x, x), [(B, S, 3)], id="cdist-self"),
    case(torch.cdist, [(B, 1, Size("few", 3, 7, 40), 3), (4, Size("many", 2, 5, 33), 3)], rtol=1e-3, atol=1e-3),
    case(lambda x: torch.cdist(x, x.new_ones(30, 3)), [(Size("few", 3, 7, 40), 3)], id="cdist-const", rtol=1e-3),
]


@parametrize(CASES)
def test_linear(row, mode, device):
    check_case(row, mode, device)


def test_scaling_down_comes_before_the_product(device):
    """torch scales the float32 accumulator: 300 * 300 * 64 / 1024 fits in half precision, 300 * 300 * 64 does not."""
    scaled = lambda a: torch.baddbmm(a.new_zeros(1), a * 0 + 300, a * 0 + 300, beta=0, alpha=1 / 1024)  # noqa: E731
    check_case(case(scaled, [half(B, 64, 64)]), "dynamic", device)


SCALES = {"mul": lambda q: q * 0.01, "div": lambda q: q / 100, "rmul": lambda q: 0.01 * q}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_factor_stays_before_the_product(scale, device):
    """300 * 300 * 64 / 100 fits in half precision, 300 * 300 * 64 does not."""
    row = case(lambda q, k: scale(q * 0 + 300) @ (k * 0 + 300).mT, [half(B, 3, 64), half(B, 5, 64)], rtol=1e-2)
    check_case(row, "dynamic", device)


def types(function, *inputs):
    graph = trace(Call(function), inputs)
    network = lower(graph).definition
    return [network.get_layer(i).type.name for i in range(network.num_layers)]


def test_no_layer_too_many():
    product = ["CONSTANT", "MATRIX_MULTIPLY"]
    assert types(torch.nn.Linear(4, 7, bias=False), torch.randn(2, 4)) == product
    assert types(torch.nn.Linear(4, 7), torch.randn(2, 3, 4)) == [*product, "CONSTANT", "ELEMENTWISE"]
    assert types(torch.matmul, torch.randn(2, 3, 4), torch.randn(2, 4, 5)) == ["MATRIX_MULTIPLY"]
    inputs = torch.randn(1, 5), torch.randn(3, 4), torch.randn(4, 5)
    assert types(torch.addmm, *inputs) == ["MATRIX_MULTIPLY", "ELEMENTWISE"]


REFUSED = [
    (torch.mm, [torch.ones(2, 3, dtype=torch.int8), torch.ones(3, 2).to(torch.int8)], "torch.int8 are not multiplied")
]


@pytest.mark.parametrize(("function", "inputs", "message"), REFUSED)
def test_refused(function, inputs, message):
    with pytest.raises(UnsupportedError, match=message):
        torch2rt(Call(function), inputs)


def test_pairs_of_a_dynamic_number_of_rows_are_refused():
    with pytest.raises(TraceError, match="how many pairs there are"):
        torch2rt(Call(F.pdist), [torch.randn(4, 3)], max_batch_size=8)


def test_scaled_sums_round_once(device):
    """`beta * input + alpha * product` is a float32 on its way to half precision."""
    x = torch.tensor([[2049.0, 3.0, 1001.0]], dtype=torch.float16, device=device)
    scaled = lambda x, a, b: torch.addmm(x, a, b, beta=0.7, alpha=1.3)  # noqa: E731
    a, b = torch.tensor([[1.0]], device=device).half(), torch.tensor([[1.0, 1000.0, -500.0]], device=device).half()
    model_trt = torch2rt(Call(scaled), [x, a, b])
    result = (model_trt if device.type == "cuda" else model_trt.reference())(x, a, b)
    exact = 0.7 * x.double() + 1.3 * (a.double() @ b.double())
    assert torch.equal(result, exact.half())


def test_kron_of_many_dimensions_is_refused():
    with pytest.raises(TraceError, match="more than 4 dimensions"):
        torch2rt(Call(torch.kron), [torch.randn(1, 2, 1, 2, 1), torch.randn(2)])


def of_matrices(functions, count):
    """Rows of functions of so many square matrices, single and half."""
    return [
        case(function, [Data((B, 64, 64), dtype)] * count, id=f"{name}-{str(dtype)[6:]}", rtol=near, atol=near)
        for name, function in functions.items()
        for dtype, near in ((torch.float32, None), (torch.float16, 8e-3))
    ]


ALONE = {
    "scaled": lambda x: (x @ x) * 0.03,
    "with a residual": lambda x: torch.sigmoid(x @ x) + x,
    "a factor inside": lambda x: (x * 0.02) @ x - 1,
    "computed twice": lambda x: (F.relu(x) @ F.relu(x)) * 0.5,
    "einsum": lambda x: torch.einsum("...ij,...jk->...ik", x, x) / 7,
    "powers": lambda x: torch.linalg.matrix_power(x * 0.1, 5) * 3,
    "Gram": lambda x: (x @ x.mT) * 0.03,
    "one row": lambda x: (x[..., :1, :] @ x[..., :1, :].mT) * 0.03,
    "a row and a column": lambda x: (x[..., 3:4, :] @ x[..., :, 5:6]) * 0.03 + 1,
    "two rows": lambda x: (x[..., :1, :] @ x[..., 1:2, :].mT) * 0.03,
}
OF_ITSELF = of_matrices(ALONE, 1)


@parametrize(OF_ITSELF)
def test_products_of_a_tensor_with_itself(row, mode, device):
    check_case(row, mode, device)


ROWS = {
    "a row": lambda x, y: (x[..., :1, :] @ y) * 0.03 + 1,
    "a row and a column": lambda x, y: (x[..., :1, :] @ y[..., 2:3]) * 0.03 + 1,
    "a row and a row": lambda x, y: (x[..., :1, :] @ y[..., 2:3, :].mT) * 0.03 + 1,
    "a row and a transpose": lambda x, y: (x[..., :1, :] @ y.mT) * 0.03 + 1,
    "two transposes": lambda x, y: (y.mT @ x[..., 1:2, :].mT) * 0.03 + 1,
    "a column": lambda x, y: (y @ x[..., 2:3]) * 0.03 + 1,
    "a sum": lambda x, y: F.silu(x[..., :1, :] @ y * 0.3).sum(-1),
    "constants": lambda x, y: (
        (x[..., :1, :] @ torch.linspace(-1, 1, 576, dtype=x.dtype, device=x.device).view(64, 9)) * 0.3 + 1
    ),
    "constants for each": lambda x, y: (
        (x[..., :1, :] @ torch.eye(64, dtype=x.dtype, device=x.device)[None].expand_as(y)) * 0.3 + 1
    ),
    "linear": lambda x, y: (
        F.linear(x[..., :1, :], torch.linspace(-1, 1, 576, dtype=x.dtype, device=x.device).view(9, 64)) * 0.3 + 1
    ),
    "einsum": lambda x, y: torch.einsum("...k,...kn->...n", x[..., 0, :], y) * 0.3 + 1,
}
OF_ONE_ROW = of_matrices(ROWS, 2)


@parametrize(OF_ONE_ROW)
def test_products_of_one_row(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_products_of_as_many_rows_as_there_are(dtype, device):
    x, y = torch.randn(2, 3, 24, device=device).to(dtype), torch.randn(2, 24, 17, device=device).to(dtype)
    sizes = {"opt_shapes": [(2, 3, 24), (2, 24, 17)], "max_shapes": [(2, 6, 24), (2, 24, 17)]}
    module = Call(lambda x, y: (x @ y) * 0.03 + 1)
    model_trt = torch2rt(module, [x, y], min_shapes=[(2, 1, 24), (2, 24, 17)], **sizes)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for rows in (1, 2, 6, 1):
        z = torch.randn(2, rows, 24, device=device).to(dtype)
        torch.testing.assert_close(run(z, y), module(z, y), rtol=8e-3, atol=8e-3)


def test_only_products_of_one_row_get_another():
    def rows_added(function, dtype=torch.float32, **ranges):
        x = torch.randn(2, 3, 8, dtype=dtype)
        network = lower(trace(Call(function), [x, torch.randn(2, 8, 8, dtype=dtype)], **ranges))
        return [layer[1] for layer in network.facts()["layers"]].count("CONCATENATION")

    some = int(computes_vectors_wrong(torch.float32, dynamic=False))
    assert rows_added(lambda x, y: x[:, :1] @ y) == some
    assert rows_added(lambda x, y: x[:, :1] @ y[..., :1]) == some
    assert rows_added(lambda x, y: y.mT @ x[:, :1].mT) == some
    assert rows_added(lambda x, y: x[:, :1] @ y.mT) == 0
    assert rows_added(lambda x, y: y @ x[:, :1].mT) == 0
    assert rows_added(lambda x, y: x @ y) == 0
    assert rows_added(lambda x, y: x[:1, :1] @ y[:1]) == 0
    assert rows_added(lambda x, y: x[:, :1] @ torch.ones(8, 5)) == 0
    rows = {"min_shapes": [(2, 1, 8), (2, 8, 8)], "max_shapes": [(2, 4, 8), (2, 8, 8)]}
    assert rows_added(lambda x, y: x @ y, torch.float32, **rows) == 0
    assert rows_added(lambda x, y: x @ y, torch.float16, **rows) == some
    rows = {"min_shapes": [(2, 2, 8), (2, 8, 8)], "max_shapes": [(2, 4, 8), (2, 8, 8)]}
    assert rows_added(lambda x, y: x @ y, torch.float16, **rows) == 0


def test_only_products_of_a_tensor_with_itself_pay_for_it():
    def negations(function):
        network = lower(trace(Call(function), [torch.randn(2, 8, 8), torch.randn(2, 8, 8)], max_batch_size=4))
        return [layer[1] for layer in network.facts()["layers"]].count("UNARY")

    assert negations(lambda x, y: (x.exp() @ y) @ (y * 2)) == 1
    assert negations(lambda x, y: (x @ x.mT) + F.scaled_dot_product_attention(x[None], y[None], y[None])) == 0
    assert negations(lambda x, y: (x @ x) + (y @ (y * 2 + 1))) == (4 if computes_squares_wrong() else 0)
