"""What eager torch refuses is refused, also where torch's fake kernels would take it."""

import logging
import re

import pytest
import torch
import torch.nn.functional as F
from test_tracing import module

from torch2rt import TraceError, UnsupportedError, torch2rt, trace

aten = torch.ops.aten
SYMBOL = re.compile(r"\bs\d+\b")


# Sizes ---------------------------------------------------------------------------------------------------------------

SIZES = [  # which shape eager refuses, and which it takes
    (lambda self, x: F.avg_pool3d(x, 2, 1, 1), (1, 2, 1, 1, 1), (1, 2, 3, 3, 3)),
    (lambda self, x: F.avg_pool2d(x, 3, 2, ceil_mode=True), (1, 2, 1, 5), (1, 2, 4, 5)),
    (lambda self, x: F.max_pool2d(x, 2, 2, 0, 2), (2, 2, 5), (2, 4, 5)),
    (lambda self, x: F.max_pool1d(x, 4), (1, 2, 3), (1, 2, 5)),
    (lambda self, x: F.lp_pool1d(x, 2.0, 4), (1, 2, 3), (1, 2, 5)),
    (lambda self, x: F.interpolate(x, scale_factor=0.5), (1, 2, 1), (1, 2, 3)),
    (lambda self, x: F.interpolate(x, scale_factor=(0.5, 1.0), mode="bilinear"), (1, 2, 1, 3), (1, 2, 4, 3)),
    (lambda self, x: F.interpolate(x, scale_factor=0.25, mode="bicubic"), (1, 2, 3, 8), (1, 2, 5, 8)),
    (lambda self, x: F.interpolate(x, scale_factor=0.5, mode="trilinear"), (1, 2, 1, 3, 3), (1, 2, 4, 3, 3)),
    (lambda self, x: aten.upsample_nearest2d.vec(x, None, [0.5, 0.5]), (1, 2, 1, 3), (1, 2, 4, 3)),
    (lambda self, x: F.unfold(x, 3), (1, 2, 2, 5), (1, 2, 4, 5)),
    (lambda self, x: F.pad(x, (2, 1), mode="reflect"), (1, 2, 2), (1, 2, 4)),
    (lambda self, x: F.conv1d(x, x.new_ones(5, 2, 3)), (1, 2, 2), (1, 2, 4)),
    (lambda self, x: x[:, 1:].amax(1), (2, 1), (2, 4)),
    (lambda self, x: x[:, 1:].max(1).values, (2, 1), (2, 4)),
    (lambda self, x: x[:, 1:].argmin(), (2, 1), (2, 4)),
    (lambda self, x: x[:, 1:].median(1).values, (2, 1), (2, 4)),
    (lambda self, x: x.unfold(1, 3, 1), (2, 2), (2, 4)),
    (lambda self, x: x.narrow(1, 1, 2), (2, 2), (2, 4)),
    (lambda self, x: x.topk(3, 1).values, (2, 2), (2, 4)),
]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("forward", "refused", "taken"), SIZES, ids=range(len(SIZES)))
def test_sizes_that_eager_refuses(forward, refused, taken, dynamic):
    made = module(forward)
    made(torch.randn(taken))
    with pytest.raises((RuntimeError, IndexError)):
        made(torch.randn(refused))
    axis = next(axis for axis, (small, large) in enumerate(zip(refused, taken)) if small != large)
    larger = tuple(size + (i == axis) for i, size in enumerate(taken))
    trace(made, [torch.randn(taken)], max_shapes=[larger])
    low, high = refused, larger if dynamic else refused
    with pytest.raises(TraceError, match=r"test_eager.py:\d+.*" + ("|false for x" if dynamic else "")):
        trace(made, [torch.randn(taken)], min_shapes=[low], max_shapes=[high])


def test_refused_sizes_are_named():
    made = module(lambda self, x: F.interpolate(x, scale_factor=0.25))
    message = r"test_eager.py:\d+: torch refuses torch.nn.functional.interpolate of float32\[1, 2, 3\] .*than 0"
    with pytest.raises(TraceError, match=message + r".*for x.shape\[2\] = 3.*Narrow the range"):
        trace(made, [torch.randn(1, 2, 12)], min_shapes=[(1, 2, 3)], max_shapes=[(1, 2, 15)])


# Types ---------------------------------------------------------------------------------------------------------------

half, bfloat16 = torch.float16, torch.bfloat16
MIXED = [
    (torch.nn.Linear(3, 5), [(2, 3)], half),
    (torch.nn.Linear(3, 5, bias=False), [(2, 4, 3)], bfloat16),
    (torch.nn.Linear(300, 500), [(2, 300)], half),  # too large to be run for real
    (torch.nn.Conv2d(4, 6, 3, groups=2), [(2, 4, 5, 7)], half),
    (torch.nn.ConvTranspose1d(4, 6, 3), [(2, 4, 5)], bfloat16),
    (torch.nn.Bilinear(3, 4, 5), [(2, 3), (2, 4)], half),
    (torch.nn.PReLU(3), [(2, 3, 4)], half),
    (torch.nn.LSTM(3, 5), [(4, 2, 3)], half),
    (torch.nn.GRUCell(3, 5), [(2, 3)], half),
    (torch.nn.MultiheadAttention(4, 2), [(3, 2, 4)] * 3, half),
    (torch.nn.TransformerEncoderLayer(4, 2, 8), [(3, 2, 4)], half),
    (module(lambda self, x: x @ self.w, w=torch.randn(3, 5)), [(2, 3)], half),
    (module(lambda self, x: torch.addmm(self.b, x, self.w), w=torch.randn(3, 5), b=torch.randn(5)), [(2, 3)], half),
    (module(lambda self, x: torch.bmm(x, self.w.expand(len(x), 3, 5)), w=torch.randn(1, 3, 5)), [(2, 4, 3)], bfloat16),
    (module(lambda self, x: torch.einsum("bi,oi->bo", x, self.w), w=torch.randn(5, 3)), [(2, 3)], half),
    (
        module(lambda self, x: F.scaled_dot_product_attention(x, self.w, self.w), w=torch.randn(2, 3, 4)),
        [(2, 3, 4)],
        half,
    ),
    (module(lambda self, x: aten.linear.default(x, self.w), w=torch.randn(5, 3)), [(2, 3)], half),
    (module(lambda self, x: torch.index_copy(self.w, 0, torch.tensor([1]), x), w=torch.randn(5, 3)), [(1, 3)], half),
    (module(lambda self, x: self.w.scatter(0, torch.tensor([[1, 2, 0]]), x), w=torch.randn(5, 3)), [(1, 3)], half),
]


@pytest.mark.parametrize("max_batch_size", [None, 8], ids=["static", "dynamic"])
@pytest.mark.parametrize(("made", "shapes", "dtype"), MIXED, ids=lambda v: getattr(v, "_get_name", lambda: "")())
def test_types_that_eager_does_not_mix(made, shapes, dtype, max_batch_size):
    inputs = [torch.randn(shape) for shape in shapes]
    given = [inputs[0].to(dtype), *inputs[1:]]
    with torch.no_grad(), pytest.raises((RuntimeError, ValueError)):
        made.eval()(*given)
    dynamic = {} if max_batch_size is None else {"max_shapes": [(9, *s[1:]) for s in shapes]}
    with pytest.raises(TraceError, match=r"Input '(\w+)' is b?float16: pass \1.float\(\)"):
        trace(made, given, **dynamic)


def test_weights_of_the_smaller_type():
    with pytest.raises(TraceError, match=r"pass image.half\(\), or convert the module after module.float\(\)"):
        trace(torch.nn.Linear(3, 5).half(), [torch.randn(2, 3)], input_names=["image"])


def test_two_inputs_of_other_types():
    made = module(lambda self, x, y: torch.relu(x) @ (y + 1))
    message = r"Input 'x' is float16: pass x.float\(\). Input 'y' is float32: pass y.half\(\)."
    with pytest.raises(TraceError, match=message):
        trace(made, [torch.randn(2, 3).half(), torch.randn(3, 5)])


def _put(x, y):
    y = y.clone()
    y[y > 0] = x[0, :1].float()
    return y


PROMOTING = [
    lambda self, x, y: _put(x, y),
    lambda self, x, y: x + y,
    lambda self, x, y: torch.cat([x, y]),
    lambda self, x, y: torch.where(x > 0, x, y),
    lambda self, x, y: torch.atan2(x, y),
    lambda self, x, y: F.linear(x.float(), y),
    lambda self, x, y: y.index_put((torch.tensor([0]),), x[0].float()),
]


@pytest.mark.parametrize("forward", PROMOTING, ids=range(len(PROMOTING)))
def test_types_that_eager_does_mix(forward):
    trace(module(forward), [torch.randn(2, 3).half(), torch.randn(2, 3)], max_shapes=[(2, 3), (2, 3)])


# Neither sizes nor types ---------------------------------------------------------------------------------------------

WRONG = [
    lambda self, x: F.conv_transpose1d(x, x.new_ones(3, 2, 2), output_padding=1),
    lambda self, x: torch.add(x, x, alpha=True) if x.dtype is torch.bool else torch.sub(x, x > 0, alpha=2) - (x > 0),
    lambda self, x: (x > 0).argmin(),
    lambda self, x: x.long()[..., ::2].mul_(0.5),
    lambda self, x: 1 - (x > 0),
]


@pytest.mark.parametrize("forward", WRONG, ids=range(len(WRONG)))
def test_arguments_that_eager_refuses(forward):
    made = module(forward)
    x = torch.randn(2, 3, 4)
    with pytest.raises((RuntimeError, TypeError)):
        made(x)
    with pytest.raises((TraceError, RuntimeError, TypeError)):
        trace(made, [x])


def test_the_generator_is_left_as_it_was():
    before = torch.get_rng_state()
    trace(
        module(lambda self, x: F.dropout(x, 0.5, self.training) + F.avg_pool1d(x, 2, 1, 1)[..., 1:]),
        [torch.randn(2, 3)[None]],
    )
    torch.set_rng_state(before)
    state = torch.get_rng_state()
    trace(module(lambda self, x: F.rrelu(x, training=self.training)), [torch.ones(2, 3)])
    assert torch.equal(torch.get_rng_state(), state)


def test_users_operators_are_not_run():
    calls = []

    @torch.library.custom_op("eager_test::counted", mutates_args=())
    def counted(x: torch.Tensor) -> torch.Tensor:
        calls.append(x)
        return x + 1

    counted.register_fake(lambda x: torch.empty_like(x))
    trace(module(lambda self, x: counted(x) * 2), [torch.randn(2, 3)])
    assert not calls


# Errors of the module itself -----------------------------------------------------------------------------------------

FITS_ITS_EXAMPLE = [
    (lambda self, x: x.view(1, 12), [(1, 3, 4)]),
    (lambda self, x: x.expand(1, 3, 5), [(1, 3, 5)]),
    (lambda self, x: x.reshape(4, 3) + 1, [(1, 12)]),
    (lambda self, x: x[:, :, None].squeeze(0).permute(1, 0), [(1, 3)]),
    (lambda self, x, y: x + y, [(4, 3), (1, 3)]),
    (lambda self, x: torch.stack(x.unbind(0)[:1] + (x[0] if x.shape[0] == 1 else None,)), [(1, 3)]),
    (lambda self, x: {1: x}[x.shape[0]], [(1, 3)]),
]


@pytest.mark.parametrize(("forward", "shapes"), FITS_ITS_EXAMPLE, ids=range(len(FITS_ITS_EXAMPLE)))
def test_a_module_that_fits_its_example_alone(forward, shapes, caplog, capfd):
    made = module(lambda self, *xs: self.inner(*xs))
    made.inner = module(forward)
    inputs = [torch.randn(shape) for shape in shapes]
    made(*inputs)
    with pytest.raises(TraceError, match=r"test_eager.py:\d+") as raised:
        trace(made, inputs, max_batch_size=4)
    assert not SYMBOL.search(str(raised.value))
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert capfd.readouterr().err == ""


def test_the_modules_own_error_with_its_example():
    """It is raised as eager raises it: with numbers, and not with symbols."""
    with pytest.raises(RuntimeError, match=r"shape '\[5\]' is invalid for input of size 6"):
        trace(module(lambda self, x: x.view(5)), [torch.randn(2, 3)], max_batch_size=4)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        trace(module(lambda self, x: self.missing(x)), [torch.randn(2, 3)])


def test_messages_name_dimensions():
    def forward(self, x):
        return torch.special.airy_ai(x.reshape(x.shape[0] * 2, -1))

    with pytest.raises(UnsupportedError) as raised:
        torch2rt(module(forward), [torch.randn(2, 4)], max_batch_size=4)
    assert not SYMBOL.search(str(raised.value))
