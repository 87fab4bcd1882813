"""How much the rounding of a network's own numbers changes its results: the yardstick of a verification.

A network rounds each number that it computes. Another implementation of the same network, such as an engine, rounds
others. `Disturbed` runs a traced graph with all these numbers off by a rounding, up or down at random: inputs, and the
results of calls that depend on them. What this does to an output is what a right implementation may differ by.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from torch2rt.tracing.calls.randomness import same_states

TF32_ROUNDING = 2.0**-11  # of a number's 10 bits after the point
# What a float32 product on a GPU is off by for each of its terms, in roundings: tensor cores add the parts of split
# numbers, and cut off what is too small. Measured on an H200 for convolutions and matrix products of 64 to 2304 terms:
# 0.03 units of 2 ** -24 of the largest result for each term; torch's own kernels are up to 18 times better.
TERM = 1 / 16
RECURRENT = 2.0**-18  # cuDNN's recurrent layers in float32 are off by so much, which is more than the engine's
# Functions behind a product are part of its kernel on a GPU. That takes a fast approximation of tanh, which TensorRT
# for RTX 1.6 on an H200 has off by up to 170 units of 2 ** -24 there, and alone by 3; all other functions are as exact
# there as alone. `gelu` is only its approximation by tanh.
FUSED = 2.0**-17
OF_TANH = frozenset("tanh tanh_ tanhshrink expm1 expm1_ gelu".split())
PRODUCTS = frozenset(
    """
        linear matmul __matmul__ __rmatmul__ mm bmm addmm baddbmm addbmm mv addmv dot vdot inner einsum
        tensordot bilinear chain_matmul grouped_mm _grouped_mm cdist _cdist_forward
    """.split()
)
NARROW = 4  # one of so many numbers of a narrow dtype is disturbed
# Calls whose results hold numbers of their arguments, or exact ones: disturbed already, and left alone to save time.
EXACT = frozenset(
    """
        view reshape permute transpose t mT T flatten unflatten squeeze unsqueeze expand expand_as repeat
        contiguous clone detach to type type_as float half bfloat16 __getitem__ getitem select narrow chunk
        split unbind index_select gather cat concat stack hstack vstack flip roll pad movedim swapaxes unfold
        view_as reshape_as as_strided tile relu relu6 hardtanh threshold max_pool1d max_pool2d max_pool3d
        adaptive_max_pool2d max min amax amin maximum minimum clamp where masked_fill neg __neg__ abs dropout
        sort topk pixel_shuffle channel_shuffle copy copy_ new_zeros zeros_like ones_like full_like meshgrid
        tril triu scatter index_put
    """.split()
)


class Disturbed(torch.fx.Interpreter):
    """A graph of `torch2rt.trace` on real tensors, each of whose roundings comes out otherwise.

    - `roundings`: how far off the numbers are, in roundings of their dtype; 0 runs the graph as it is.
    - `tf32`: float32 is rounded as TF32 is.
    - `on_gpu`: products and recurrent layers are rounded as GPUs do.
    - `keep`: names of nodes whose values are to be found in `kept` after a run.
    - `within`: a context to run in.

    >>> Disturbed(trace(torch.nn.Linear(3, 5), [torch.ones(2, 3)]), 1.0).run(torch.ones(2, 3))  # doctest: +SKIP
    (tensor(...),)
    """

    def __init__(
        self,
        graph: torch.fx.GraphModule,
        roundings: float,
        seed: int = 0,
        tf32: bool = False,
        keep: Collection[str] = (),
        within: AbstractContextManager[Any] | None = None,
        on_gpu: bool = False,
    ) -> None:
        super().__init__(graph)
        self.within = within or nullcontext()
        self.roundings, self.tf32, self.keep, self.on_gpu = roundings, tf32, frozenset(keep), on_gpu
        self.generator = torch.Generator().manual_seed(seed)
        self.noise: dict[tuple[torch.device, int], torch.Tensor] = {}
        self.kept: dict[str, Any] = {}
        self.device: torch.device | None = None
        self.rounded = _rounded(graph.graph) if roundings else frozenset()
        self.fused = _fused(graph.graph) if roundings and on_gpu else frozenset()

    def fetch_attr(self, target: str) -> Any:
        """A constant on the inputs' device: those that passes have computed are on the CPU."""
        value = super().fetch_attr(target)
        return value.to(self.device) if isinstance(value, torch.Tensor) and self.device is not None else value

    def __call__(self, tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        self.device = next((x.device for x in tensors), None)
        with torch.no_grad(), same_states(), self.within:
            return self.run(*tensors)

    def run_node(self, node: torch.fx.Node) -> Any:
        value = super().run_node(node)
        if node in self.rounded:
            inside, within = None, 0.0
            if node.op == "call_function":
                args, _ = self.fetch_args_kwargs_from_env(node)
                inside = args[1].dtype if _name(node.target) == "recurrent" else None
                within = _within(_name(node.target), args) if self.on_gpu else 0.0
                within = max(within, FUSED if node in self.fused else 0.0)
            value = tree_map_only(torch.Tensor, lambda x: self.disturb(x, inside, within), value)
        if node.name in self.keep:
            self.kept[node.name] = value
        return value

    def disturb(self, x: torch.Tensor, inside: torch.dtype | None = None, within: float = 0.0) -> torch.Tensor:
        """The same with each number off, up or down, by a rounding of its dtype or of the one it is computed in.

        `within`: how far off float32 is for what happens within the call, if that is more.
        """
        if not (x.is_floating_point() or x.is_complex()) or not x.numel():
            return x
        dtype = x.dtype.to_real()
        eps = max(torch.finfo(dtype).eps, torch.finfo(inside or dtype).eps)
        if dtype is torch.float32 and inside in (None, torch.float32):
            eps = TF32_ROUNDING if self.tf32 and inside is None else max(eps, within)
        step = self.roundings * eps
        # Sums in float32 round many times, those of narrow dtypes once, by 0.3 units in the last place on average.
        among = 1 if dtype is torch.float32 else NARROW
        # Activations may be most of the memory, so that the result is written over the factors.
        drawn = self.drawn(x.numel(), x.device, among).view(x.shape)
        factors = torch.empty_like(x, dtype=dtype).copy_(drawn).mul_(step).add_(1)
        return x * factors if x.is_complex() else factors.mul_(x)

    def drawn(self, count: int, device: torch.device, among: int) -> torch.Tensor:
        """So many numbers, of which one among so many is 1 or -1, and the others are 0.

        They are drawn once and begin elsewhere for each call.
        """
        have = self.noise.get((device, among))
        if have is None or len(have) < 2 * count:
            drawn = torch.randint(0, 2 * among, (2 * count,), generator=self.generator, dtype=torch.int8)
            have = drawn.masked_fill_(drawn == 0, -1).masked_fill_(drawn > 1, 0).to(device)
            self.noise[device, among] = have
        start = int(torch.randint(0, len(have) - count + 1, (), generator=self.generator))
        return have[start : start + count]


def _rounded(graph: torch.fx.Graph) -> frozenset[torch.fx.Node]:
    """The nodes whose numbers are rounded and depend on an input's values, not on its sizes alone."""
    valued: set[torch.fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or any(
            source in valued and not isinstance(source.meta.get("val"), (int, torch.SymInt, torch.SymFloat))
            for source in node.all_input_nodes
        ):
            valued.add(node)
    return frozenset(
        node
        for node in valued
        if node.op == "placeholder" or node.op == "call_function" and _name(node.target) not in EXACT
    )


def _fused(graph: torch.fx.Graph) -> frozenset[torch.fx.Node]:
    """Functions that take a tanh of products, or of what is computed element by element from them."""
    behind: set[torch.fx.Node] = set()
    for node in graph.nodes:
        name = _name(node.target)
        if node.op == "call_function" and (
            name in PRODUCTS or "conv" in name or name in _POINTWISE and not behind.isdisjoint(node.all_input_nodes)
        ):
            behind.add(node)
    return frozenset(node for node in behind if _name(node.target) in OF_TANH and not _is_exact_gelu(node))


def _is_exact_gelu(node: torch.fx.Node) -> bool:
    return _name(node.target) == "gelu" and "tanh" not in (*node.args, *node.kwargs.values())


_POINTWISE = OF_TANH | frozenset(
    """
        sigmoid silu erf exp exp2 softplus mish elu celu selu logsigmoid sin cos tan log log1p log2 hardswish
        pow __pow__ sqrt rsqrt softmax log_softmax chunk split getitem
        add sub mul div neg add_ sub_ mul_ div_ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__
        relu relu6 leaky_relu clamp to float half view reshape unflatten flatten squeeze unsqueeze __getitem__
    """.split()
)


def _within(name: str, args: Sequence[Any]) -> float:
    """How far off the results of a float32 call on a GPU are, beside their largest."""
    if name == "recurrent":
        return RECURRENT
    tensors = [x for x in tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim()]
    terms = 0
    if "conv" in name and len(tensors) > 1:
        weight = tensors[1]
        terms = weight.numel() // max(1, weight.shape["transpose" in name])
    elif "attention" in name and len(tensors) > 1:
        terms = max(tensors[1].shape[-2:])
    elif name in PRODUCTS or name.startswith("fft_"):  # which are products with the roots of one
        terms = max((x.shape[-1] for x in tensors), default=0)
    return terms * TERM * torch.finfo(torch.float32).eps


def _name(target: Any) -> str:
    return getattr(target, "__name__", str(target)).split(".")[0]
