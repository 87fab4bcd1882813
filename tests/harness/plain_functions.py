"""A simple call of every public torch function that has no converter of its own, and how it is converted.

`PYTHONPATH=tests python -m harness.plain_functions` measures them all and writes `torch2rt/cli/levels.py`; then
`python -m torch2rt.cli.ops` prints what `docs/operators.md` should be.
"""

import textwrap
from pathlib import Path

import torch
import torch.nn.functional as F

from harness import Data, case, floats, ints, prepared
from torch2rt import lower, trace
from torch2rt.callables import qualified_name
from torch2rt.errors import Torch2RTError
from torch2rt.registry import load

linalg, special, fft, Tensor = torch.linalg, torch.special, torch.fft, torch.Tensor


def of(owner, names, inputs, *args, **kwargs):
    """The same call of several functions; those that this torch does not have are left out."""
    return [case(getattr(owner, name), inputs, *args, **kwargs) for name in names.split() if hasattr(owner, name)]


class Via:
    """A function called in a way of its own: `call(function, *inputs)`."""

    def __init__(self, function, call):
        self.function, self.call = function, call

    def __call__(self, *inputs, **kwargs):
        return self.call(self.function, *inputs, **kwargs)


def via(call, owner, names, inputs, *args, **kwargs):
    functions = [Via(getattr(owner, name), call) for name in names.split() if hasattr(owner, name)]
    return [case(function, inputs, *args, id=function.function.__name__, **kwargs) for function in functions]


def in_a_list(function, *tensors):
    return function(tensors)


def to_complex(function, x, *args, **kwargs):
    return torch.view_as_real(function(x, *args, **kwargs).resolve_conj())


def of_complex(function, x, *args):
    result = function(torch.view_as_complex(x), *args)
    return torch.view_as_real(result.resolve_conj()) if result.is_complex() else result


def unpooled(function, x):
    pool = getattr(F, function.__name__.replace("un", ""))
    return function(*pool(x, 2, return_indices=True), 2)


SQUARE, LABELS, ROW = floats(3, 3), ints(4, low=0, high=3), (4, 3)
SIGNS = Data((4,), torch.float32, -1.0, 1.0)
SHARES = floats(4, 3, low=0.1, high=0.9)

CASES = [
    # Shapes
    *of(torch, "adjoint alias_copy atleast_1d atleast_2d atleast_3d detach_copy fliplr flipud rot90 t_copy", [(2, 3)]),
    *of(torch, "diag diagflat", [(3,)]),
    *of(torch, "diff gradient trapezoid trapz cumulative_trapezoid", [(2, 5)]),
    case(torch.permute_copy, [(2, 3)], [1, 0]),
    case(torch.expand_copy, [(1, 3)], [2, 3]),
    case(torch.view_copy, [(2, 3)], [3, 2]),
    case(torch.squeeze_copy, [(2, 1)], 1),
    *of(torch, "unsqueeze_copy unbind_copy", [(2, 3)], 0),
    *of(torch, "select_copy swapaxes transpose_copy movedim moveaxis", [(2, 3)], 0, 1),
    *of(torch, "narrow_copy", [(2, 3)], 1, 0, 2),
    *of(torch, "slice_copy", [(4, 3)], 0, 1, 3),
    *of(torch, "unfold_copy", [(2, 6)], 1, 2, 2),
    *of(torch, "split_copy unsafe_split unsafe_chunk hsplit vsplit", [(4, 6)], 2),
    case(torch.dsplit, [(2, 3, 4)], 2),
    *of(torch, "split_with_sizes_copy unsafe_split_with_sizes", [(4, 6)], [1, 3]),
    case(torch.tile, [(2, 3)], (2, 2)),
    *of(torch, "block_diag broadcast_tensors meshgrid cartesian_prod", [(3,), (3,)]),
    *via(in_a_list, torch, "column_stack dstack hstack row_stack vstack", [ROW, ROW]),
    case(torch.combinations, [(4,)]),
    *of(torch, "native_channel_shuffle", [(2, 4, 3, 3)], 2),
    *of(F, "native_channel_shuffle", [(2, 4, 3, 3)], 2),
    case(torch.unravel_index, [ints(5, low=0, high=6)], (2, 3)),
    case(Tensor.sum_to_size, [(2, 3)], 1, 3),
    *via(to_complex, torch, "view_as_complex_copy", [(3, 2)]),
    *via(to_complex, Tensor, "cfloat cdouble chalf", [(2, 3)]),
    *of(Tensor, "to_dense", [(2, 3)]),
    *of(Tensor, "to_sparse", [(2, 3)]),
    # Arithmetic
    *of(torch, "isclose ldexp logaddexp2 float_power", [(2, 3), (2, 3)]),
    *of(torch, "igamma igammac", [floats(2, 3), floats(2, 3)]),
    case(torch.cross, [(2, 3), (2, 3)]),
    *of(torch, "corrcoef cov", [(3, 5)]),
    *of(torch, "dist", [(2, 3), (2, 3)]),
    *of(torch, "nanmean norm norm_except_dim nuclear_norm", [(3, 4)]),
    case(torch.frobenius_norm, [(3, 4)], 1),
    case(torch.renorm, [(3, 4)], 2, 0, 1.0),
    case(torch.tensordot, [(2, 3), (3, 2)], 1),
    *of(torch, "allclose equal", [(2, 3), (2, 3)]),
    *of(torch, "histogram", [(8,)], 4),
    *of(torch, "histogramdd", [(8, 2)], [3, 3]),
    *of(torch, "hash_tensor", [(2, 3)]),
    # Linear algebra
    case(linalg.diagonal, [(2, 3, 3)]),
    *of(linalg, "matrix_sqrth polar", [SQUARE]),
    case(linalg.vander, [(4,)]),
    case(torch.orgqr, [(4, 3), (3,)]),
    *of(torch, "svd_lowrank pca_lowrank", [(6, 4)], 2),
    case(torch.lobpcg, [(9, 9)], 1),
    # Special functions
    *of(special, "entr ndtr airy_ai bessel_j0 bessel_j1 bessel_y0 bessel_y1 spherical_bessel_j0", [floats(2, 3)]),
    *of(special, "modified_bessel_i0 modified_bessel_i1 modified_bessel_k0 modified_bessel_k1", [floats(2, 3)]),
    *of(special, "scaled_modified_bessel_k0 scaled_modified_bessel_k1", [floats(2, 3)]),
    *of(special, "gammainc gammaincc zeta", [floats(2, 3, low=1.1, high=3), floats(2, 3)]),
    *of(
        special,
        "chebyshev_polynomial_u chebyshev_polynomial_v chebyshev_polynomial_w "
        "shifted_chebyshev_polynomial_t shifted_chebyshev_polynomial_u shifted_chebyshev_polynomial_v "
        "shifted_chebyshev_polynomial_w hermite_polynomial_h hermite_polynomial_he laguerre_polynomial_l "
        "legendre_polynomial_p",
        [floats(2, 3, low=0.1, high=0.9)],
        3,
    ),
    # Spectra
    *of(fft, "fftshift ifftshift", [(2, 4, 6)]),
    *via(to_complex, fft, "rfft rfft2 rfftn ihfft ihfft2 ihfftn", [(2, 4, 6)]),
    *via(of_complex, fft, "fft fft2 fftn ifft ifft2 ifftn irfft irfft2 irfftn hfft hfft2 hfftn", [(2, 4, 6, 2)]),
    *via(to_complex, torch, "stft", [(2, 64)], 16, return_complex=True),
    # Networks
    *of(F, "adaptive_avg_pool2d", [(2, 3, 6, 6)], 2),
    *of(F, "adaptive_avg_pool3d", [(2, 3, 4, 4, 4)], 2),
    *of(F, "adaptive_max_pool1d_with_indices", [(2, 3, 6)], 2),
    *of(F, "adaptive_max_pool2d_with_indices max_pool2d_with_indices", [(2, 3, 6, 6)], 2),
    *of(F, "adaptive_max_pool3d_with_indices max_pool3d_with_indices", [(2, 3, 4, 4, 4)], 2),
    *of(F, "fractional_max_pool2d_with_indices", [(2, 3, 6, 6)], 2, 3),
    *of(F, "fractional_max_pool3d_with_indices", [(2, 3, 6, 6, 6)], 2, 3),
    case(F.lp_pool1d, [floats(2, 3, 6)], 2, 2),
    case(F.lp_pool2d, [floats(2, 3, 6, 6)], 2, 2),
    case(F.lp_pool3d, [floats(2, 3, 4, 4, 4)], 2, 2),
    *via(unpooled, F, "max_unpool1d", [(2, 3, 6)]),
    *via(unpooled, F, "max_unpool2d", [(2, 3, 6, 6)]),
    *via(unpooled, F, "max_unpool3d", [(2, 3, 4, 4, 4)]),
    case(F.batch_norm, [(2, 3, 4), (3,), floats(3)]),
    case(F.group_norm, [(2, 4, 5)], 2),
    case(F.instance_norm, [(2, 3, 5)]),
    *of(F, "layer_norm rms_norm", [(2, 3, 5)], (5,)),
    case(F.local_response_norm, [(2, 4, 5)], 2),
    case(F.normalize, [(2, 3)]),
    *of(F, "softmax log_softmax softmin", [(2, 3)], 1),
    case(F.tanhshrink, [(2, 3)]),
    case(F.gumbel_softmax, [(2, 3)]),
    case(F.grid_sample, [(2, 3, 4, 4), (2, 5, 5, 2)], align_corners=False),
    case(F.interpolate, [(2, 3, 4, 4)], scale_factor=2.0),
    *of(torch, "conv_tbc", [(5, 2, 3), (3, 3, 4), (4,)]),
    *of(F, "conv_tbc", [(5, 2, 3), (3, 3, 4), (4,)]),
    case(torch.embedding_bag, [(5, 3), ints(4, low=0, high=5)], torch.tensor([0, 2]), id="embedding_bag"),
    case(torch.native_dropout, [(2, 3)], 0.5, False),
    # Losses
    *of(F, "mse_loss l1_loss smooth_l1_loss huber_loss kl_div soft_margin_loss hinge_embedding_loss", [ROW, ROW]),
    *of(F, "multilabel_soft_margin_loss binary_cross_entropy_with_logits", [ROW, SHARES]),
    case(F.poisson_nll_loss, [ROW, floats(4, 3)]),
    *of(torch, "kl_div hinge_embedding_loss", [ROW, ROW]),
    *of(torch, "binary_cross_entropy_with_logits", [ROW, SHARES]),
    case(torch.poisson_nll_loss, [ROW, floats(4, 3)], True, False, 1e-8, 1),
    case(F.binary_cross_entropy, [SHARES, SHARES]),
    case(F.gaussian_nll_loss, [ROW, ROW, floats(4, 3)]),
    *of(F, "cross_entropy nll_loss multi_margin_loss", [ROW, LABELS]),
    case(F.multilabel_margin_loss, [ROW, ints(4, 3, low=0, high=3)]),
    *of(F, "cosine_embedding_loss", [ROW, ROW, SIGNS]),
    *of(torch, "cosine_embedding_loss", [ROW, ROW, SIGNS]),
    *of(F, "margin_ranking_loss", [(4,), (4,), SIGNS]),
    *of(torch, "margin_ranking_loss", [(4,), (4,), SIGNS]),
    *of(F, "triplet_margin_loss triplet_margin_with_distance_loss", [ROW, ROW, ROW]),
    *of(torch, "triplet_margin_loss", [ROW, ROW, ROW]),
    *of(F, "linear_cross_entropy", [ROW, (5, 3), LABELS]),
    case(F.ctc_loss, [(6, 2, 4), ints(2, 3, low=1, high=4)], (6, 6), (3, 3)),
    case(torch.ctc_loss, [(6, 2, 4), ints(2, 3, low=1, high=4)], (6, 6), (3, 3)),
    # Quantization
]

# Public, but not what a module computes with: sparse, nested and quantized tensors, kernels of other backends, the
# inner parts of training, gradients, memory, and questions that Python asks while it is traced.
LEFT_OUT = """
    quantize q_ fbgemm miopen batch_norm_ sym_ _sym_ is_ int_repr dequantize choose_qparams fused_moving qscheme
    hsmm hspmm saddmm smm sspaddmm ccol_ crow_ col_ row_ind indices values coalesce sparse_ dense_ slice_inverse
    native_norm binomial autocast get_device numel nelement dim ndim size element_size storage untyped_ data_ptr
    const_data_ptr backward register_ retain_ record_ module_load index item numpy tolist to_mkldnn ipu mtia xpu
    resize indices_copy values_copy dim_order
""".split()
EXACTLY = ("index", "item", "numpy", "dim", "size", "indices", "values")  # of these, no longer names


def target(row):
    return row.function.function if isinstance(row.function, Via) else row.function


def public():
    """The public functions of torch that have neither a converter nor an advice what to write instead."""
    registry = load()
    served = {id(t) for table in (registry.converters, registry.composites) for t in table}
    overridable = [f for functions in torch.overrides.get_overridable_functions().values() for f in functions]
    for owner in (torch, Tensor, F, linalg, fft, special):
        for name in dir(owner):
            function = getattr(owner, name)
            hidden = name.startswith("_") or name.endswith("_") or (owner is Tensor and hasattr(torch, name))
            if hidden or id(function) in served or not any(function is f for f in overridable):
                continue
            if registry.find(function) is None and registry.advice(function) is None:
                yield function


def is_left_out(function):
    name = qualified_name(function).rpartition(".")[2]
    return name in EXACTLY or any(name.startswith(start) for start in LEFT_OUT if start not in EXACTLY)


def level(row):
    """How a row's function is converted; `refused` if it is not."""
    module, example, _ = prepared(row, "static", torch.device("cpu"))
    try:
        graph = trace(module, example)
        network = lower(graph)
    except Torch2RTError:
        return "refused", None
    function = target(row)
    made = [node.target for node in graph.graph.nodes if node.meta.get("function") is function]
    return "aten" if any(isinstance(t, torch._ops.OpOverload) for t in made) else "opened", network


def measure():
    """The tables of `torch2rt/cli/levels.py`."""
    found = {}
    for row in CASES:
        found.setdefault(level(row)[0], []).append(qualified_name(target(row)))
    return {name: sorted(set(names)) for name, names in found.items()}


if __name__ == "__main__":
    root = Path(__file__).parents[2]
    version = ".".join(torch.__version__.split(".")[:2])
    lines = ['"""How torch functions without a converter are converted: by `tests/harness/plain_functions.py`."""']
    lines += ["", f'TORCH = "{version}"', "", "MEASURED = {"]
    for name, names in measure().items():
        lines += [
            f'    "{name}": """',
            *textwrap.wrap(" ".join(names), 112, initial_indent=" " * 8, subsequent_indent=" " * 8),
            '    """,',
        ]
    (root / "torch2rt" / "cli" / "levels.py").write_text("\n".join([*lines, "}", ""]))
