import copy

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, Data, S, case, check_case, floats, half, parametrize

from torch2rt import ConversionError, lower, torch2rt, trace

nn, aten = torch.nn, torch.ops.aten


def bf16(*shape):
    return Data(shape, torch.bfloat16)


def trained(module):
    """A module with parameters and statistics as training leaves them."""
    module = copy.deepcopy(module).eval()
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point():
                value.copy_(torch.rand(value.shape) + 0.5 if "bias" not in name else torch.randn(value.shape))
    return module


BATCH = [
    case(trained(nn.BatchNorm1d(6)), [(B, 6)], id="BatchNorm1d"),
    case(trained(nn.BatchNorm1d(6, eps=0.1)), [(B, 6, S)], id="BatchNorm1d-length"),
    case(trained(nn.BatchNorm2d(6)), [(B, 6, S, 5)], id="BatchNorm2d"),
    case(trained(nn.BatchNorm2d(6, affine=False)), [(B, 6, S, 5)], id="BatchNorm2d-no-affine"),
    case(trained(nn.BatchNorm3d(6)), [(B, 6, 3, S, 5)], id="BatchNorm3d"),
    case(trained(nn.BatchNorm2d(6)).half(), [half(B, 6, S, 5)], id="BatchNorm2d-half"),
    case(trained(nn.BatchNorm2d(6)).bfloat16(), [bf16(B, 6, S, 5)], id="BatchNorm2d-bfloat16"),
    case(trained(nn.BatchNorm1d(6)).half(), [half(B, 6)], id="BatchNorm1d-half"),
    case(nn.BatchNorm2d(6, track_running_stats=False), [(B * 2, 6, S, 5)], id="BatchNorm2d-batch-statistics"),
    case(
        lambda x: F.batch_norm(x, x.new_tensor([1e3, 2e3]), x.new_tensor([1e-9, 1e-6]), eps=1e-15),
        [(B, 2, 3, S)],
        id="small-variance",
        rtol=1e-3,
    ),
    case(
        lambda x: F.batch_norm(x, x.new_tensor([1.0, 2.0]), x.new_tensor([0.0, 0.0]), eps=1e-12),
        [half(B, 2, 3, S)],
        id="beyond-half",
        rtol=1e-2,
        modes=("dynamic",),
    ),
    case(
        lambda x: torch.batch_norm(x, None, x.new_ones(3), x.new_ones(3), x.new_ones(3) * 4, False, 0.1, 0.5, True),
        [(B, 3, S)],
        id="torch.batch_norm",
    ),
    case(
        lambda x: torch.native_batch_norm(x, None, None, x.new_ones(3), x.new_ones(3), False, 0.1, 0.5)[0],
        [(B, 3, S)],
        id="native_batch_norm",
    ),
    case(
        lambda x: aten._native_batch_norm_legit_no_training(x, None, None, x.new_ones(3), x.new_ones(3), 0.1, 0.5)[0],
        [(B, 3, S)],
        id="native_batch_norm_legit_no_training",
    ),
]


def autocast(x):
    """Autocast shows torch's operators, which return more than its functions."""
    with torch.autocast(x.device.type, torch.bfloat16):
        return F.layer_norm(x, (5,)), F.group_norm(x, 2)


LAYER = [
    case(autocast, [(B, 4, 5)]),
    case(trained(nn.LayerNorm(5)), [(B, S, 5)], id="LayerNorm"),
    case(trained(nn.LayerNorm((3, 5), eps=0.1)), [(B, S, 3, 5)], id="LayerNorm-2"),
    case(trained(nn.LayerNorm((4, 3, 5), bias=False)), [(B, 4, 3, 5)], id="LayerNorm-3-no-bias"),
    case(nn.LayerNorm(5, elementwise_affine=False), [(B, S, 5)], id="LayerNorm-no-affine"),
    case(trained(nn.LayerNorm(5)), [(5,)], id="LayerNorm-1d"),
    case(trained(nn.LayerNorm((3, 5))).half(), [half(B, S, 3, 5)], id="LayerNorm-half"),
    case(trained(nn.LayerNorm(5)).bfloat16(), [bf16(B, S, 5)], id="LayerNorm-bfloat16"),
    case(trained(nn.LayerNorm(5)), [(B, 2, 3, 2, S, 5)], id="LayerNorm-6d"),
    case(F.layer_norm, [(B, S, 5)], (5,), None, torch.tensor([1.0, 2, 3, 4, 5]), 0.5, modes=("static",)),
    case(lambda x: F.layer_norm(x, x.shape[1:]), [(B, S, 5)], id="layer_norm-dynamic-sizes"),
    case(lambda x, w, b: F.layer_norm(x, (5,), w, b), [(B, S, 5), (5,), (5,)], id="layer_norm-given-weight"),
    case(
        lambda x: torch.layer_norm(x, (3, 5), x.new_ones(3, 5) * 2, None, 1e-3, False),
        [(B, 3, 5)],
        id="torch.layer_norm",
    ),
    case(lambda x: torch.native_layer_norm(x, (5,), None, None, 1e-3)[0], [(B, S, 5)], id="native_layer_norm"),
    case(lambda x: torch.native_layer_norm(x, (3, 5), None, None, 1e-3), [(B, 3, 5)], id="native_layer_norm-all"),
    case(lambda x, w: aten.native_layer_norm.default(x, (5,), w, None, 1e-3), [half(B, S, 5), half(5)], id="aten-all"),
]

GROUP = [
    case(trained(nn.GroupNorm(3, 6)), [(B, 6, S, 5)], id="GroupNorm"),
    case(trained(nn.GroupNorm(1, 6, eps=0.1)), [(B, 6, S, 5)], id="GroupNorm-1"),
    case(trained(nn.GroupNorm(6, 6)), [(B, 6, S)], id="GroupNorm-6"),
    case(trained(nn.GroupNorm(2, 6)), [(B, 6)], id="GroupNorm-2d"),
    case(trained(nn.GroupNorm(1, 6)), [(B, 6)], id="GroupNorm-2d-1"),
    case(nn.GroupNorm(2, 6, affine=False), [(B, 6, 2, S, 5)], id="GroupNorm-3d-no-affine"),
    case(trained(nn.GroupNorm(3, 6)).half(), [half(B, 6, S, 5)], id="GroupNorm-half"),
    case(F.group_norm, [(B, 6, S), (6,), (6,)][:1], 2, eps=0.5),
    case(lambda x, w, b: F.group_norm(x, 2, w, b), [(B, 6, S), (6,), (6,)], id="group_norm-given-weight"),
    case(
        lambda x, w: torch.native_group_norm(x, w, None, x.shape[0], 6, x.shape[2] * 5, 3, 1e-3),
        [(B, 6, S, 5), (6,)],
        id="native_group_norm-all",
    ),
    case(
        lambda x, w: aten.native_group_norm(x, w, w, 2, 6, 5, 1, 1e-3),
        [half(2, 6, 5), half(6)],
        id="aten.native_group_norm-all",
    ),
    case(
        lambda x: torch.native_group_norm(x, None, None, x.shape[0], 6, x.shape[2] * 5, 3, 1e-5)[0],
        [(B, 6, S, 5)],
        id="native_group_norm",
    ),
    case(nn.InstanceNorm1d(4), [(B, 4, S)], id="InstanceNorm1d"),
    case(nn.InstanceNorm1d(4), [(4, S)], id="InstanceNorm1d-unbatched"),
    case(trained(nn.InstanceNorm2d(4, eps=0.1, affine=True)), [(B, 4, S, 5)], id="InstanceNorm2d"),
    case(
        trained(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
        [(B, 4, S, 5)],
        id="InstanceNorm2d-running",
    ),
    case(trained(nn.InstanceNorm3d(4, affine=True)).half(), [half(B, 4, 2, S, 5)], id="InstanceNorm3d-half"),
]

FOUR = (torch.rand(3) + 0.5, torch.randn(3), torch.randn(3), torch.rand(3) + 0.5)


def first_of(function, *args):
    """What is normalised, of a call that returns statistics too."""
    return lambda x: function(x, *(a.to(x.device) if isinstance(a, torch.Tensor) else a for a in args))[0]


OTHER = [
    *(
        case(first_of(function, *args), [(B, 3, S)], id=str(function))
        for function, *args in (
            (aten._native_batch_norm_legit.default, *FOUR, False, 0.1, 1e-3),
            (aten._native_batch_norm_legit.no_stats, *FOUR[:2], True, 0.1, 1e-3),
            (aten._native_batch_norm_legit_functional.default, *FOUR, False, 0.1, 1e-3),
            (aten._batch_norm_no_update.default, *FOUR, 0.1, 1e-3),
            (aten._batch_norm_impl_index.default, *FOUR, False, 0.1, 1e-3, True),
        )
    ),
    case(first_of(torch._fused_rms_norm, (5,), torch.rand(5), 1e-3), [(B, S, 5)], id="fused_rms_norm"),
    case(trained(nn.RMSNorm(5)), [(B, S, 5)], id="RMSNorm"),
    case(trained(nn.RMSNorm((3, 5), eps=0.1)), [(B, S, 3, 5)], id="RMSNorm-2"),
    case(trained(nn.RMSNorm(5)).half(), [half(B, S, 5)], id="RMSNorm-half"),
    case(F.rms_norm, [floats(B, S, 5, low=-1e-4, high=1e-4, dtype=torch.float16)], (5,)),
    case(F.rms_norm, [floats(B, S, 5, low=200, high=1000, dtype=torch.float16)], (5,), eps=1e-6),
    case(trained(nn.RMSNorm(5)).bfloat16(), [bf16(B, S, 5)], id="RMSNorm-bfloat16"),
    case(lambda x, w: torch.rms_norm(x, (5,), w, 1e-3), [(B, S, 5), (5,)], id="rms_norm-given-weight"),
    case(F.local_response_norm, [(B, 7, S, 5)], 3, alpha=0.5, beta=0.6, k=2.0),
    case(F.local_response_norm, [(B, 7, S)], 4, 0.1),
    case(F.local_response_norm, [(B, 7, 2, S, 3)], 5),
    case(F.normalize, [(B, 7, S)]),
    case(F.normalize, [half(B, 7, S)], 3.0, -1, 1e-6),
    case(lambda x, m, v: F.batch_norm(x, m, v.abs(), eps=1e-2), [(B, 3, S, 4), (3,), (3,)], id="batch_norm-statistics"),
    case(
        lambda x, m, v, w, b: F.batch_norm(x, m, v.abs(), w, b, eps=1e-2),
        [(B, 3), (3,), (3,), (3,), (3,)],
        id="batch_norm-all-computed",
    ),
    case(
        lambda x, w: F.batch_norm(x, w.new_zeros(3), w.new_ones(3) * 2, w),
        [half(B, 3, S), half(3)],
        id="batch_norm-weight",
    ),
]


@parametrize(BATCH)
def test_batch_norm(row, mode, device):
    check_case(row, mode, device)


@parametrize(LAYER)
def test_layer_norm(row, mode, device):
    check_case(row, mode, device)


@parametrize(GROUP)
def test_group_norm(row, mode, device):
    check_case(row, mode, device)


@parametrize(OTHER)
def test_other_norms(row, mode, device):
    check_case(row, mode, device)


def kinds(module, *inputs):
    network = lower(trace(module.eval(), list(inputs))).definition
    return [network.get_layer(i).type for i in range(network.num_layers)]


def test_group_norm_scaled_per_group(monkeypatch, device):
    """TensorRT 10.3 scales per group: the weights of the channels come after the layer."""
    from torch2rt.converters import normalization

    monkeypatch.setattr(normalization, "scales_groups_by_channel", lambda: False)
    monkeypatch.setattr(normalization, "add_normalization", lambda network, *args: network.add_normalization(*args))
    check_case(case(trained(nn.GroupNorm(3, 6)), [(B, 6, S, 5)]), "dynamic", device)


def test_statistics_have_the_type_of_the_parameters():
    """On the CPU, the only device that normalises half precision with float32 parameters."""
    row = case(lambda x, w: torch.native_layer_norm(x, (5,), w, None, 1e-3), [half(B, 5), (5,)])
    check_case(row, "dynamic", torch.device("cpu"))


@pytest.mark.parametrize(
    ("module", "shapes", "message"),
    [
        (nn.BatchNorm2d(3).train(), [(2, 3, 4, 4)], "eval()"),
        (nn.InstanceNorm2d(3, track_running_stats=True).train(), [(2, 3, 4, 4)], "eval()"),
        (Call(lambda x, m: F.batch_norm(x, m, m * m, training=True)), [(2, 3, 4, 4), (3,)], "writes to its input"),
    ],
)
def test_refused(module, shapes, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(module, [torch.randn(s) for s in shapes])
