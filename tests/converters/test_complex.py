import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, case, check_case, compare, floats, ints, parametrize
from torch import nn
from torch._higher_order_ops.while_loop import while_loop

from torch2rt import InputError, UnsupportedError, torch2rt

view_as_real = torch.view_as_real


def pairs(x):
    """The last dimension, two numbers at a time, as complex ones."""
    return torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))


def on_pairs(function):
    """A function of complex tensors as one of real tensors."""

    def real(*inputs):
        result = function(*map(pairs, inputs))
        parts = [
            view_as_real(r.resolve_conj()) if r.is_complex() else r
            for r in (result if isinstance(result, (tuple, list)) else [result])
        ]
        return parts if isinstance(result, (tuple, list)) else parts[0]

    return real


def one(function, *shapes, id, **kwargs):
    return case(on_pairs(function), shapes or [(B, 3, 8)], id=id, **kwargs)


def two(function, *shapes, id, **kwargs):
    return case(on_pairs(function), shapes or [(B, 3, 8), (B, 3, 8)], id=id, **kwargs)


def waves(*shape, like):
    """A constant complex tensor."""
    values = torch.arange(2.0 * torch.Size(shape).numel(), device=like.device).reshape(*shape, 2)
    return torch.view_as_complex(torch.sin(values * 1.7))


ARITHMETIC = [
    two(lambda a, b: a + b, id="add"),
    two(lambda a, b: torch.add(a, b, alpha=2 - 1j), id="add-alpha"),
    two(lambda a, b: a + b[..., :1].real, id="add-real"),
    two(lambda a, b: a[:, :1].real - b, id="real-sub"),
    two(lambda a, b: torch.sub(a, b, alpha=3), id="sub-alpha"),
    two(lambda a, b: a * b, id="mul"),
    two(lambda a, b: a * b.imag, id="mul-real"),
    two(lambda a, b: a / b, id="div"),
    two(lambda a, b: a / (b * 1e25), id="div-large"),
    two(lambda a, b: a / b.real, (B, 3, 8), floats(B, 3, 8), id="div-real"),
    two(lambda a, b: a.conj() * b, id="conj"),
    two(lambda a, b: a.conj().imag + b.conj().real, id="conj-imag"),
    two(lambda a, b: torch.where(a.real > b.imag, a, b), id="where"),
    two(lambda a, b: torch.where(a.real > b.imag, a, 0.5), id="where-number"),
    two(lambda a, b: [a == b, a != b, a == a, a.real == 3j], id="eq"),
    one(lambda a: [1j - a, 2 - a, a - 1, a + 3j, a * 2, a * 1j, a * (2 - 3j), a * True, a / 2j], id="numbers"),
    one(lambda a: [2 / a, 1j / a], floats(B, 3, 8), id="number-by"),
    one(lambda a: [-a, +a, a.conj(), a.conj_physical(), torch.resolve_conj(a.conj()), a.real, a.imag], id="parts"),
    one(lambda a: [a.abs(), a.angle(), torch.sgn(a), a.reciprocal(), a.abs() ** 2], id="polar-form"),
    one(lambda a: [a**2, a**3, a**-2, a**0, a**1, torch.pow(a, 0.5), a**2.5, a.square()], id="pow"),
    one(lambda a: [a.exp(), a.log(), a.sqrt()], id="exp"),
    one(lambda a: (a * 1e30).abs(), id="abs-large"),
    one(lambda a: (a * 1e-30).abs() * 1e30, id="abs-small"),
    one(lambda a: [torch.isnan(a), torch.isfinite(a / 0 * a), torch.isinf(a)], id="isnan"),
    one(lambda a: [a.sum(), a.sum((0, -1)), a.mean(1, True), a.cumsum(1), a.norm(dim=-1), a.norm(p=1)], id="reduce"),
    one(lambda a: a * waves(4, like=a), id="constant"),
    one(lambda a: a * waves(4, like=a).conj(), id="constant-conj"),
    one(lambda a: a.real * waves(3, 4, like=a).conj().imag, id="constant-neg"),
    one(lambda a: a.real * waves(1, like=a).conj().imag, id="constant-neg-one"),
    one(lambda a: a * torch.tensor(2j, dtype=torch.complex128, device=a.device), id="number-tensor"),
    one(lambda a: [a.real * 1j, torch.exp(-1j * a.real), a.real + 2j], id="real-and-number"),
    case(lambda x, y: view_as_real(torch.complex(x, y[:1])), [(B, 3), (B, 3)], id="complex"),
    case(lambda x, y: view_as_real(torch.polar(x, y)), [floats(B, 3), (B, 3)], id="polar"),
    case(lambda x: view_as_real(x.to(torch.complex64) * 1j), [(B, 3)], id="to"),
    case(lambda x: view_as_real(x.cfloat()), [ints(B, 3)], id="cfloat"),
    case(lambda x: [x.real, x.conj(), torch.real(x), x.angle(), x.resolve_conj()], [(B, 3)], id="of-real"),
    case(torch.angle, [ints(B, 3)], id="angle-of-ints"),
    one(lambda a: view_as_real(a.sum()), id="0-d"),
]


@parametrize(ARITHMETIC)
def test_arithmetic(row, mode, device):
    check_case(row, mode, device)


PLACES = [
    one(lambda a: a.permute(2, 0, 1).contiguous().view(4, -1).unsqueeze(0).expand(2, -1, -1).flatten(1), id="view"),
    one(lambda a: [a.mT, a.mH, a.transpose(0, 1), a.movedim(0, 2), a.squeeze(1), a.reshape(-1)], id="transpose"),
    one(lambda a: [a[:, 1:, ::2], a[0], a[..., None, -1], a[:, [2, 0]]], id="index"),
    one(lambda a: [a.narrow(1, 1, 2), a.select(1, -1)], id="narrow"),
    one(lambda a: [*a.chunk(2, 1), *a.split([1, 2], 1), *a.unbind(1), *a.tensor_split(2, -1)], id="split"),
    one(lambda a: [a.roll(1, -1), a.flip(0), a.repeat(1, 2, 1), a.tile(2), a.unfold(-1, 2, 1)], id="again"),
    one(lambda a: [F.pad(a, (1, 2)), F.pad(a, (0, 1, 2, -1), value=2.0)], id="pad"),
    one(lambda a: [a.diagonal(0, 1, 2), a.tril(), a.triu(1), torch.diag_embed(a)], id="diagonal"),
    one(lambda a: [a.index_select(1, torch.tensor([2, 0], device=a.device)), a.clone().detach()], id="select"),
    one(lambda a: [torch.zeros_like(a) + a, torch.ones_like(a) * a, torch.full_like(a, 2j) * a], id="like"),
    one(lambda a: [a.new_zeros(4) + a, a.masked_fill(a.real > 0, 2 + 1j), F.dropout(a, 0.5, False)], id="fill"),
    one(lambda a: a.unsqueeze(0).sum(0, keepdim=True).expand(3, *a.shape), id="expand"),
    one(lambda a: a.index_copy(1, torch.tensor([2, 0], device=a.device), a[:, :2] * 2j), id="index_copy"),
    one(lambda a: a.index_put((torch.tensor([0], device=a.device),), a[:1] * 2j), id="index_put"),
    one(lambda a: a.scatter(1, (a.real > 9).long()[:, :1], a * 2j), id="scatter"),
    one(lambda a: a.scatter_add(1, (a.real > 0).long(), a.conj() * 2j), id="scatter_add"),
    one(lambda a: a.scatter(2, (a.imag > 0).long()[..., :3], a[..., :3] - 1j, reduce="add"), id="scatter-add"),
    one(lambda a: a.scatter_reduce(1, (a.real > 0).long(), a * 2j, "sum", include_self=False), id="scatter_reduce"),
    one(lambda a: a.index_add(1, torch.tensor([2, 0, 2], device=a.device), a * 2j, alpha=1 - 3j), id="index_add"),
    one(lambda a: a.put(torch.tensor([2, 0, 2], device=a.device), a[0, :, 1], accumulate=True), id="put"),
    one(lambda a: a.index_put((torch.tensor([0, 0], device=a.device),), a[:1] * 2j, True), id="index_put-accumulate"),
    one(lambda a: torch.linspace(a[0, 0, 0], 4.5 - 1j, 5, device=a.device), id="linspace"),
    case(
        lambda x: view_as_real(torch.linspace(x[0, 0], 4.5, 5, dtype=torch.complex64, device=x.device)),
        [(B, 4)],
        id="linspace-to-complex",
    ),
    one(lambda a: torch.mv(a[0], a[0, 0]), id="mv"),
    two(lambda a, b: [torch.cat([a, b], 1), torch.stack([a, b], -1), torch.cat([a, b.real], -1)], id="join"),
    one(lambda a: torch.cat([a, waves(1, 3, 4, like=a)]), id="join-constant"),
    one(lambda a: [torch.fft.fftshift(a, 1), torch.fft.ifftshift(a)], id="shift"),
    case(lambda x: pairs(x).real.half() + pairs(x).to(torch.float16), [(B, 4)], id="to-half"),
]


@parametrize(PLACES)
@pytest.mark.filterwarnings("ignore:Casting complex values")
def test_places(row, mode, device):
    check_case(row, mode, device)


def written(write):
    """A function that writes to its complex tensor, which is then read."""

    def function(x):
        z = pairs(x) * 1
        return z, z if (seen := write(z)) is None else seen

    return lambda x: on_pairs(lambda z: function(x))(x)


def through(view):
    """Write through a view of a complex tensor."""

    def write(z):
        view(z).mul_(2).add_(1)

    return write


def before(view):
    """Write to the tensor after a view was made, and look at the view."""

    def write(z):
        seen = view(z)
        z.mul_(1j).add_(2)
        return seen

    return write


def assign(z):
    z[:, 1] = z[:, 0]
    z[0] *= 2j
    z[..., 1] = 3
    z.real = z.imag * 2
    z.imag[:, :, 0] = 5
    z[z.real > 2] = 1j


VIEWS = {
    "real": lambda z: z.real,
    "imag": lambda z: z.imag,
    "view_as_real": lambda z: view_as_real(z)[..., 1],
    "conj": lambda z: z.conj(),
    "conj-imag": lambda z: z.conj().imag,
    "row": lambda z: z[:, 1],
    "transposed": lambda z: z.mH,
}
CONJUGATE = ("conj", "conj-imag", "transposed")  # torch fixes dynamic sizes when it writes through one
WRITES = [
    *[case(written(through(v)), [(2, 3, 8)], id=f"through-{name}", modes=("static",)) for name, v in VIEWS.items()],
    *[
        case(written(through(view)), [(B, 3, 8)], id=f"through-{name}", modes=("dynamic",))
        for name, view in VIEWS.items()
        if name not in CONJUGATE
    ],
    *[case(written(before(view)), [(B, 3, 8)], id=f"before-{name}") for name, view in VIEWS.items()],
    case(written(assign), [(B, 3, 8)], id="assign"),
    case(written(lambda z: z.conj_physical_()), [(B, 3, 8)], id="conj_physical_"),
    case(written(lambda z: torch.mul(z, z, out=z)), [(B, 3, 8)], id="out"),
    case(written(lambda z: z.copy_(z.real)), [(B, 3, 8)], id="copy_"),
    case(written(lambda z: z.fill_(2j)), [(B, 3, 8)], id="fill_"),
    case(written(lambda z: z.masked_fill_(z.real > 0, 3j)), [(B, 3, 8)], id="masked_fill_"),
]


@parametrize(WRITES)
def test_writes(row, mode, device):
    check_case(row, mode, device)


def written_real(x):
    x = x * 1
    z = pairs(x.view(-1, 8))
    x += 1
    z *= 2j
    return x


def filled(x):
    z = torch.zeros(2, 3, dtype=torch.complex64, device=x.device)
    z[0], z[1] = pairs(x[0]), x[1, :3]
    return view_as_real(z)


def test_writes_to_memory_that_is_real_elsewhere(device):
    check_case(case(written_real, [(B, 8)]), "dynamic", device)
    check_case(case(filled, [(2, 6)]), "static", device)


PRODUCTS = [
    two(lambda a, b: [a @ b.mT, a @ b.mH, a @ b[0, 0], torch.bmm(a, b.mT)], id="matmul"),
    one(lambda a: a @ waves(4, 5, like=a), id="matmul-constant"),
    two(lambda a, b: torch.einsum("bij,bkj->bik", a, b), id="einsum"),
    two(lambda a, b: torch.einsum("bij,bkj,bkl->bil", a, b, a), id="einsum-three"),
    one(lambda a: torch.einsum("bij->ib", a), id="einsum-one"),
    two(lambda a, b: [torch.tensordot(a, b, dims=[[1, 2], [1, 2]]), torch.outer(a[0, 0], b[0, 1])], id="tensordot"),
    two(lambda a, b: [torch.dot(a[0, 0], b[0, 1]), torch.vdot(a[0, 0], b[0, 1]), torch.inner(a, b[0])], id="dot"),
    one(nn.Linear(4, 5, dtype=torch.complex64), id="Linear"),
    one(nn.Conv1d(3, 5, 3, padding=1, dtype=torch.complex64), id="Conv1d"),
    one(nn.Conv2d(3, 4, (3, 2), bias=False, dtype=torch.complex64), (B, 3, 5, 12), id="Conv2d"),
    one(nn.ConvTranspose2d(3, 4, 3, stride=2, dtype=torch.complex64), (B, 3, 5, 8), id="ConvTranspose2d"),
]


@parametrize(PRODUCTS)
def test_products(row, mode, device):
    """Whose modules `on_pairs` hides from `.to(device)`."""
    for cell in row.function.__closure__ or ():
        if isinstance(cell.cell_contents, nn.Module):
            cell.cell_contents.to(device)
    check_case(row, mode, device)


def test_control_flow(device):
    """Complex numbers inside of branches and loops; `torch.cond` itself does not run them."""

    def chosen(x):
        return torch.cond(x.sum() > 0, lambda x: (pairs(x) * 1j).real, lambda x: pairs(x).abs(), (x,))

    model_trt = torch2rt(Call(chosen), [torch.randn(2, 4, device=device)])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    x = torch.rand(2, 4, device=device)
    compare(run(x), (pairs(x) * 1j).real)
    compare(run(-x), pairs(x).abs())

    def repeated(x):
        return while_loop(lambda x: x.sum() < 9, lambda x: (x + (pairs(x) * pairs(x).conj()).real.sum(),), (x,))[0]

    check_case(case(repeated, [floats(B, 4)]), "static", device)


# Rotary embeddings ---------------------------------------------------------------------------------------------------


def apply_rotary_emb(xq, xk, freqs_cis):
    """As Meta's reference code of Llama has it."""
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    assert freqs_cis.shape == (xq_.shape[1], xq_.shape[-1])
    shape = [d if i == 1 or i == xq_.ndim - 1 else 1 for i, d in enumerate(xq_.shape)]
    freqs_cis = freqs_cis.view(*shape)
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


class Attention(nn.Module):
    def __init__(self, width=32, heads=4, length=32, theta=10000.0):
        super().__init__()
        self.heads, self.size = heads, width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        freqs = 1.0 / theta ** (torch.arange(0, self.size, 2).float() / self.size)
        angles = torch.outer(torch.arange(length), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles))

    def forward(self, x, start=0):
        batch, length, _ = x.shape
        q, k, v = (y.view(batch, length, self.heads, self.size) for y in self.qkv(x).chunk(3, -1))
        q, k = apply_rotary_emb(q, k, self.freqs_cis[start : start + length])
        y = F.scaled_dot_product_attention(*(y.transpose(1, 2) for y in (q, k, v)), is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, length, -1))


def rotate(x, position):
    """With the positions as an input."""
    freqs = torch.polar(torch.ones(9, 4), torch.outer(torch.arange(9.0), torch.arange(4.0))).to(x.device)
    return view_as_real(pairs(x) * freqs[position]).flatten(-2)


MODELS = [
    case(Attention(), [(B, S, 32)], id="attention"),
    case(rotate, [(B, S, 8), ints(B, S, low=0, high=9)], id="positions"),
]


@parametrize(MODELS)
def test_models(row, mode, device):
    check_case(row, mode, device)


def test_half_precision_turns_in_float32(device):
    module = Attention().half().eval().to(device)
    x = torch.randn(2, 7, 32, dtype=torch.float16, device=device)
    model_trt = torch2rt(module, [x])
    with torch.no_grad():
        compare((model_trt if device.type == "cuda" else model_trt.reference())(x), module(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_leaves_complex_numbers_alone(dtype, device):
    def function(x):
        with torch.autocast(x.device.type, dtype):
            return view_as_real(pairs(x) * CONSTANT.to(x.device) + pairs(x).conj()).abs()

    x = torch.randn(2, 8, device=device)
    model_trt = torch2rt(Call(function), [x])
    compare((model_trt if device.type == "cuda" else model_trt.reference())(x), function(x))


def test_constants_are_shared():
    """Each part of a complex buffer is one constant, however many layers use it."""

    def function(x):
        z = pairs(x) * CONSTANT
        return view_as_real(z * CONSTANT)

    network = torch2rt(Call(function), [torch.randn(2, 8)]).network
    kinds = [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert kinds.count("CONSTANT") == 2


CONSTANT = torch.polar(torch.ones(4), torch.arange(4.0))


# Refused -------------------------------------------------------------------------------------------------------------

REFUSED = [
    (pairs, r"'output_0' is torch.complex64.*view_as_real"),
    (on_pairs(torch.tanh), r"torch.tanh\(complex64\[2, 4\]\): there is no converter .* complex"),
    (on_pairs(lambda a: a**a), "the power of a real number"),
    (on_pairs(lambda a: a.bool()), "compare with 0"),
    (on_pairs(lambda a: a.to("meta")), "device"),
    (on_pairs(lambda a: a.view(torch.float32)), "result of torch.float32 is not supported"),
    (lambda x: x.view(torch.complex64).real, "of real numbers it makes complex ones"),
    (lambda x: x.sum(-1, dtype=torch.complex64).real, "of real numbers it makes complex ones"),
    (lambda x: x.to(torch.complex128).real, "an output is float64"),
    (lambda x: torch.polar(x.half(), x.half()).real, "complex32; of complex types, complex64"),
    (
        on_pairs(lambda a: torch.cond(a.real.sum() > 0, lambda a: a * 2, lambda a: a + 1, (a,))),
        "cond.*no converter for it on complex",
    ),
    (
        lambda x: while_loop(lambda z: z.real.sum() < 9, lambda z: (z * 2,), (pairs(x),))[0].real,
        "there is no converter .* complex",
    ),
]


@pytest.mark.parametrize(("function", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(function, message):
    with pytest.raises(UnsupportedError, match=message):
        torch2rt(Call(function), [torch.randn(2, 8)])


def test_complex_inputs_are_refused():
    with pytest.raises(InputError, match=r"'input_0' is torch.complex64.*view_as_real"):
        torch2rt(Call(lambda x: x.real), [torch.randn(2, 3, dtype=torch.complex64)])
