"""Random programs of size arithmetic and branches: each is right at every size of its range, or refused with a line.

Once in one graph for the whole range, and once in as many as it takes. `--size-programs 2000` draws more of them.
"""

import collections
import math
import random
import re
import time

import torch
import torch.nn.functional as F

from torch2rt import InputError, TraceError, UnsupportedError, lower, trace
from torch2rt.debug.same_values import SameValues
from torch2rt.graph import graph_meta
from torch2rt.runtime.module import ReferenceModule
from torch2rt.tracing.trace import Traces, trace_variants

LONGEST = 10  # seconds of a trace
VARIANTS = 8


class Program(torch.nn.Module):
    """Python code that computes with the sizes of `x` (batch, length, width) and of `y` (batch, length)."""

    def __init__(self, code):
        super().__init__()
        self.code = code
        scope = {"torch": torch, "F": F, "math": math}
        exec(compile(code, "program.py", "exec"), scope)
        self.run = scope["run"]

    def forward(self, x, y):
        return self.run(x, y)


class Writer:
    """Writes one program; `names` hold sizes, `x` and `y` are tensors of three and two dimensions."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.names = ["b", "n", "w", "m"]
        self.lines = ["b, n, w = x.shape", "m = y.shape[1]"]

    def pick(self, *choices):
        return self.random.choice(choices)

    def size(self, depth=2):
        """An expression for a whole number."""
        if not depth or self.random.random() < 0.35:
            return self.pick(*self.names)
        a, b, k = self.size(depth - 1), self.size(depth - 1), self.random.randint(2, 7)
        return self.pick(
            f"({a} + {b})",
            f"({a} - {b})",
            f"({a} + {k})",
            f"({a} * {k})",
            f"({a} // {k})",
            f"({a} % {k})",
            f"(-{a} % {k})",
            f"(({a} + {k - 1}) // {k} * {k})",
            f"max({a}, {b})",
            f"min({a}, {k})",
            f"max({a}, {k}, {b})",
            f"math.ceil({a} / {k})",
            f"math.floor({a} * 0.6)",
            f"round({a} / {k})",
            f"divmod({a}, {k})[{k % 2}]",
            f"math.isqrt(abs({a}))",
            f"abs({a} - {b})",
            f"int({a} * 0.7)" if self.random.random() < 0.3 else f"torch.sym_int({a} * 0.7)",
        )

    def question(self):
        a, b, k = self.size(1), self.size(1), self.random.randint(0, 6)
        return self.pick(
            f"{a} % 2",
            f"{a} > {b}",
            f"{a} == {b}",
            f"{a} != {k}",
            f"{a} >= {k} and {b} > 2",
            f"{a} * {b} > {10 * k}",
            f"not ({a} % 3 or {b} % 2)",
            f"{a} in ({k}, {k + 2})",
        )

    def step(self):
        """A line that keeps `x` and `y` of their ranks."""
        s, k = self.size(), self.random.randint(1, 5)
        dim = self.random.randint(0, 2)
        return self.pick(
            f"x = x[:, :{s}]",
            f"x = x[:, -{k}:]",
            f"x = x[:, {k}:] * 2",
            f"x = x[..., :{k}]",
            f"x = F.pad(x, (0, {s} % 4, {k}, -n % {k}))",
            f"x = x + {s}",
            f"x = x * ({s} / {k})",
            f"y = y[:, : {s}]",
            f"y = torch.cat([y, y[:, :{k}] - 1], 1)",
            "x = x + y.sum(1)[:, None, None]",
            "x = x.transpose(1, 2)",
            f"x = x.narrow({dim}, 0, max(x.shape[{dim}] // {k}, 1))",
            f"x = x.reshape(x.shape[0], -1, 1) * {s}",
            "x = x.flatten(1)[:, None]",
            f"x = x + torch.arange(x.shape[{2}], device=x.device) * {s}",
            f"x = F.avg_pool1d(x, {k}, ceil_mode=True) if x.shape[2] >= {k} else x",
            f"x = F.interpolate(x, size=max({s}, 1) % 9 + 1)",
            f"x = x.repeat(1, {s} % 3 + 1, 1)",
            f"y = y * torch.tensor([{s}, {k}]).sum()",
            f"x = x.new_zeros(x.shape[0], {s} % 5 + 1, x.shape[2]) + x.sum(1, keepdim=True)",
        )

    def program(self):
        for i in range(self.random.randint(1, 5)):
            choice = self.random.random()
            if choice < 0.3:
                self.lines.append(f"s{i} = {self.size()}")
                self.names.append(f"s{i}")
            elif choice < 0.5:
                self.lines += [f"if {self.question()}:", f"    {self.step()}"]
                if self.random.random() < 0.5:
                    self.lines += ["else:", f"    {self.step()}"]
            else:
                self.lines.append(self.step())
        self.lines.append(self.pick("return x, y", f"return x * 2, y, {self.size()}"))
        return "def run(x, y):\n" + "".join(f"    {line}\n" for line in self.lines)

    def ranges(self):
        """The shapes of `x` and `y`: their batches are one, and the other sizes have ranges of their own."""
        ends = []
        for least, most in [(1, 4), (1, 30), (1, 12), (1, 30)]:
            low = self.pick(least, least, self.random.randint(least, most))
            high = self.pick(low, most, self.random.randint(low, most))
            ends.append((low, self.random.randint(low, high), high))
        return [[(b, n, w), (b, m)] for b, n, w, m in zip(*ends)]


class Variants:
    """What serves a range: a call goes to the variant that takes its shapes, whose network the reference evaluates."""

    def __init__(self, made, tensors, ranges):
        with Traces(made, tensors, **ranges, progress=False) as traces:
            found = trace_variants(traces, VARIANTS, SameValues(made, tensors, lower))
        self.parts = [(graph_meta(variant.graph).interface, variant.graph) for variant in found]
        self.runs = {}

    def __call__(self, *inputs):
        shapes = [tuple(x.shape) for x in inputs]
        serving = [i for i, (interface, _) in enumerate(self.parts) if interface.serves(shapes)]
        if not serving:
            raise InputError(f"no variant takes {shapes}")
        for i in serving:
            if i not in self.runs:
                self.runs[i] = ReferenceModule(lower(self.parts[i][1]))
        first, *others = [self.runs[i](*inputs) for i in serving]
        for other in others:  # regions may overlap: what serves a size must be right there, whichever is called
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)
        return first


def one_graph(made, tensors, ranges):
    return ReferenceModule(lower(trace(made, tensors, **ranges, progress=False)))


def outcome(seed, convert=one_graph):
    """How a program went: "right", or why it was refused; raises `AssertionError` where it is wrong."""
    writer = Writer(seed)
    made, (low, opt, high) = Program(writer.program()).eval(), writer.ranges()
    torch.manual_seed(seed)
    try:
        made(*[torch.randn(shape) for shape in opt])
    except (RuntimeError, IndexError, ValueError, ZeroDivisionError):
        return "wrong in eager"
    start = time.process_time()
    try:
        ranges = {"min_shapes": low, "opt_shapes": opt, "max_shapes": high}
        run = convert(made, [torch.randn(shape) for shape in opt], ranges)
    except (TraceError, UnsupportedError) as error:
        assert re.search(r"program\.py:\d+|engines for the range|raises an error", str(error)), error
        return "refused"
    finally:
        assert time.process_time() - start < LONGEST * (1 if convert is one_graph else VARIANTS)
    try:
        return compared(made, run, writer, low, high)
    except UnsupportedError as error:  # of one of several variants
        assert re.search(r"program\.py:\d+", str(error)), error
        return "refused"


def compared(made, run, writer, low, high):
    (b0, n0, w0), (_, m0) = low
    (b1, n1, w1), (_, m1) = high
    sizes = [(b0, n0, w0, m0), (b1, n1, w1, m1)]
    sizes += [tuple(map(writer.random.randint, (b0, n0, w0, m0), (b1, n1, w1, m1))) for _ in range(8)]
    for b, n, w, m in sizes:
        inputs = torch.randn(b, n, w), torch.randn(b, m)
        try:
            expected = made(*inputs)
        except (RuntimeError, IndexError, ValueError, ZeroDivisionError) as error:
            expected = error
        try:
            got = run(*inputs)
        except InputError as error:
            assert isinstance(expected, Exception), f"refused at {(b, n, w, m)}, where eager is not: {error}"
            continue
        assert not isinstance(expected, Exception), f"served at {(b, n, w, m)}, where eager raises {expected}"
        for ours, theirs in zip(got, expected, strict=True):
            if isinstance(theirs, torch.Tensor):
                assert ours.dtype == theirs.dtype, (b, n, w, m)
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            else:
                assert ours == theirs, (b, n, w, m)
    return "right"


def counted(seeds, convert):
    counts = collections.Counter()
    for seed in seeds:
        try:
            counts[outcome(seed, convert)] += 1
        except Exception as error:
            raise AssertionError(f"program {seed}:\n{Program(Writer(seed).program()).code}") from error
    print(dict(counts))
    return counts


def test_programs_of_sizes(pytestconfig):
    counts = counted(range(pytestconfig.getoption("--size-programs")), one_graph)
    assert counts["right"] > 0.4 * counts.total()


def test_programs_of_sizes_in_several_graphs(pytestconfig):
    seeds = range(1000, 1000 + pytestconfig.getoption("--size-programs") // 5)
    counts = counted(seeds, Variants)
    assert counts["right"] > 0.6 * counts.total()
