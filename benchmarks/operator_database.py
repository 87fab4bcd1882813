"""Convert every operator of PyTorch's own test database, and compare the results with those of eager torch.

    python benchmarks/operator_database.py                               # float32, functions
    python benchmarks/operator_database.py --dtypes int64 complex64 --samples 3
    python benchmarks/operator_database.py --variants inplace out method linalg.svd add

`torch.testing._internal.common_methods_invocations.op_db` has some 600 entries, each with samples of arguments. A row
is one sample, with static sizes or with a dynamic first dimension. It is converted without `fallback`, and if that is
refused, with it (`--fallback`: with it alone); the reference evaluator says what the result computes. Rows are

- `right`: as in eager torch, in one engine or, in the second column, with `fallback=True` only,
- `refused`: refused with `fallback=True`, too,
- `found`: `AccuracyError`; `wrong`: not as in eager torch, without an error,
- `raw`: an exception that is not torch2rt's own; `crash` and `timeout`: of the worker process.

`--rows FILE` keeps the rows as JSON, a line each. What eager torch refuses, or gives another result for each time, is
no row. The worker runs one row at a time, and is started again when it ends or takes longer than `--limit` seconds.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import torch2rt

VARIANTS = ("function", "method", "inplace", "out")
GROWTH = 2  # rows that the dynamic dimension has more than the sample


class Call(nn.Module):
    """A call of an operator whose tensors are the module's inputs; what else it takes is the module's own."""

    def __init__(self, function: Callable[..., Any], arguments: Any, variant: str, outs: Any = None) -> None:
        super().__init__()
        self.function, self.variant, self.outs = function, variant, outs
        flat, self.spec = tree_flatten(arguments)
        self.others = [None if isinstance(value, torch.Tensor) else value for value in flat]
        self.places = [place for place, value in enumerate(flat) if isinstance(value, torch.Tensor)]
        self.has_dummy = not self.places
        self.writes = False  # whether the operator writes to its arguments, so that the module copies them

    def forward(self, *tensors: torch.Tensor) -> Any:
        flat = list(self.others)
        for place, tensor in zip(self.places, tensors, strict=False):
            flat[place] = tensor.clone() if self.writes else tensor
        args, kwargs = tree_unflatten(flat, self.spec)
        if self.variant == "inplace":
            args = (args[0].clone(), *args[1:])
        if self.variant == "out":
            kwargs = {**kwargs, "out": tree_map(lambda o: torch.empty(o[0], dtype=o[1]), self.outs, is_leaf=_is_out)}
        result = self.function(*args, **kwargs)
        if self.variant == "out":
            result = (result, kwargs["out"])
        return (result, tensors[0] + 1) if self.has_dummy else result


def _is_out(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], torch.dtype)


def eager(call: nn.Module, tensors: list[torch.Tensor]) -> Any:
    """The result of torch, on copies."""
    torch.manual_seed(3)
    return call(*[tensor.clone() for tensor in tensors])


def same(actual: Any, expected: Any, roundings: bool = True) -> str | None:
    """How two results differ, apart from roundings."""
    a, spec = tree_flatten(actual)
    b, other = tree_flatten(expected)
    if spec != other and len(a) != len(b):
        return f"{spec} is not {other}"
    for index, (x, y) in enumerate(zip(a, b, strict=True)):
        if not isinstance(y, torch.Tensor) or not isinstance(x, torch.Tensor):
            if type(x) is not type(y) or x != y:
                return f"result {index}: {x!r} is not {y!r}"
            continue
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"result {index}: {x.dtype}{list(x.shape)} is not {y.dtype}{list(y.shape)}"
        wide = y.is_floating_point() or y.is_complex()
        x, y = (t.resolve_conj().resolve_neg().to_dense() if t.layout is not torch.strided else t for t in (x, y))
        finite = y[y.isfinite()].abs() if wide else y
        largest = float(finite.max()) if wide and finite.numel() else 0.0
        loose = (2e-2 if y.dtype in (torch.float16, torch.bfloat16) else 1e-3) * roundings
        try:
            torch.testing.assert_close(x, y, rtol=loose if wide else 0, atol=loose * largest, equal_nan=True)
        except AssertionError as error:
            return f"result {index}: " + " ".join(str(error).split())[:200]
    return None


def convert(
    call: nn.Module,
    tensors: list[torch.Tensor],
    larger: list[torch.Tensor] | None,
    ways: Sequence[bool] = (False, True),
) -> tuple[str, str]:
    """The state of a row and what is to be said of it; `ways` are the values of `fallback` to try in turn."""
    message = ""
    ranges = {} if larger is None else {"max_shapes": [tuple(tensor.shape) for tensor in larger]}
    for fallback in ways:
        try:
            torch.manual_seed(3)
            given = [tensor.clone() for tensor in tensors]
            model_trt = torch2rt.torch2rt(call, given, fallback=fallback, optimization_level=0, **ranges)
            for sizes in (tensors, larger) if larger is not None else (tensors,):
                expected = eager(call, sizes)
                torch.manual_seed(3)
                differs = same(model_trt.reference()(*[tensor.clone() for tensor in sizes]), expected)
                if differs:
                    return "wrong", differs
            is_whole = isinstance(model_trt, torch2rt.TRTModule)
            return "right" if is_whole else "right with fallback", message
        except torch2rt.errors.AccuracyError as error:
            return "found", ("fallback: " if fallback else "") + str(error)
        except torch2rt.errors.Torch2RTError as error:
            message = str(error)
        except Exception as error:
            return "raw", f"{type(error).__name__}: {error}\n{''.join(traceback.format_exc()[-1500:])}"
    return "refused", message


def grown(call: nn.Module, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
    """The tensors with more rows, with which torch runs the call: the first, or all that have as many."""
    if not tensors[0].dim() or tensors[0].shape[0] < 2:
        return None
    rows = tensors[0].shape[0]
    has_rows = [tensor.dim() > 0 and tensor.shape[0] == rows for tensor in tensors]
    for chosen in ([True] + [False] * (len(tensors) - 1), has_rows):
        larger = [_with_more_rows(t) if has else t for t, has in zip(tensors, chosen, strict=True)]
        with contextlib.suppress(Exception):
            eager(call, larger)
            return larger
    return None


def _with_more_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Rows that are larger than the last, so that there are no ties, and what is sorted stays sorted."""
    last = tensor[-1:]
    more = [last + step if last.is_floating_point() else last for step in range(1, GROWTH + 1)]
    return torch.cat([tensor, *more])


UNDEFINED = ("empty", "empty_strided", "new_empty", "new_empty_strided", "empty_like", "empty_permuted")


def database() -> list[Any]:
    with contextlib.suppress(ImportError):
        import torchvision  # noqa: F401
    from torch.testing._internal.common_methods_invocations import op_db

    return sorted((op for op in op_db if op.name not in UNDEFINED), key=lambda op: (op.name, op.variant_test_name))


def full_name(op: Any) -> str:
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def _function(op: Any, variant: str) -> Any:
    if variant == "out":
        return op.op if op.supports_out else None
    return {"function": op.op, "method": op.method_variant, "inplace": op.inplace_variant}[variant]


def rows_of(
    op: Any, dtype: torch.dtype, variant: str, count: int
) -> Iterator[tuple[str, nn.Module, list, list | None]]:
    """The rows of an entry: a name, a module, its inputs, and inputs with more rows."""
    function = _function(op, variant)
    if function is None:
        return
    torch.manual_seed(0)
    samples = list(op.sample_inputs("cpu", dtype, requires_grad=False))
    step = max(1, len(samples) // count)  # over all of them: the first are often alike
    for index in list(range(0, len(samples), step))[:count]:
        sample = samples[index]
        arguments = ((sample.input, *sample.args), dict(sample.kwargs))
        tensors = [value for value in tree_flatten(arguments)[0] if isinstance(value, torch.Tensor)]
        if any(tensor.layout is not torch.strided for tensor in tensors):
            continue
        call = Call(function, arguments, variant).eval()
        if variant == "out":
            call.variant = "function"
            try:
                call.outs = tree_map(lambda t: (tuple(t.shape), t.dtype), eager(call, tensors))
            except Exception:
                continue
            call.variant = variant
        tensors = tensors or [torch.tensor([0.5, -1.5])]
        try:
            given = [tensor.clone() for tensor in tensors]
            call(*given)
            call.writes = same(given, tensors, roundings=False) is not None
            first, second = eager(call, tensors), eager(call, tensors)
        except Exception:
            continue  # torch does not run it on the CPU
        if same(second, first) is not None:
            continue  # what it gives is undefined
        if not all(isinstance(value, torch.Tensor) for value in tree_flatten(first)[0]):
            continue  # such as torch.equal, whose bool is Python's
        name = f"{full_name(op)}[{index}] {str(dtype).removeprefix('torch.')} {variant}"
        yield f"{name} static", call, tensors, None
        if variant != "out" and (larger := grown(call, tensors)) is not None:
            yield f"{name} dynamic", call, tensors, larger


def work(pipe: Connection, options: argparse.Namespace) -> None:
    """Answer entries with a message for each row: before it begins, and when it is done."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    entries = {full_name(op): op for op in database()}
    while (message := pipe.recv()) is not None:
        name, dtype, variant, skipped = message
        op = entries[name]
        try:
            rows = rows_of(op, getattr(torch, dtype), variant, options.samples)
            for row, call, tensors, larger in rows:
                if row in skipped or options.sizes not in (None, "static" if larger is None else "dynamic"):
                    continue
                pipe.send(("begins", row, ""))
                with torch.no_grad():
                    state, said = convert(call, tensors, larger, (True,) if options.fallback else (False, True))
                pipe.send((state, row, said))
        except Exception as error:
            pipe.send(("skipped", name, f"{type(error).__name__}: {error}"))
        pipe.send(("ends", name, ""))


class Worker:
    """A process that converts, started again when it is gone."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.process: Any = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, self.options), daemon=True)
        self.process.start()
        theirs.close()

    def stop(self) -> int | None:
        self.process.kill()
        self.process.join()
        code, self.process = self.process.exitcode, None
        return code

    def rows(self, name: str, dtype: str, variant: str) -> Iterator[tuple[str, str, str]]:
        """State, row and message of each row of an entry."""
        done: set[str] = set()
        while True:
            if self.process is None:
                self.start()
            self.pipe.send((name, dtype, variant, done))
            row = ""
            while True:
                try:
                    if not self.pipe.poll(self.options.limit + (0 if row else 120)):
                        state, text = "timeout", ""
                        self.stop()
                        break
                    state, what, text = self.pipe.recv()
                except (EOFError, OSError):
                    self.process.join()
                    state, text = "crash", f"exit code {self.process.exitcode}"
                    self.process = None
                    break
                if state == "ends":
                    return
                if state == "begins":
                    row = what
                elif state != "skipped":
                    done.add(what)
                    row = ""
                    yield state, what, text
            if not row:
                yield state, f"{name} {dtype} {variant}", text
                return
            done.add(row)
            yield state, row, text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="entries, such as add or linalg.svd; all by default")
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--variants", nargs="+", default=["function"], choices=VARIANTS)
    parser.add_argument("--samples", type=int, default=6, help="of an entry, at most")
    parser.add_argument("--limit", type=float, default=60, help="seconds for a row")
    parser.add_argument("--fallback", action="store_true", help="convert with fallback=True alone")
    parser.add_argument("--sizes", choices=("static", "dynamic"), help="rows with such sizes alone; both by default")
    parser.add_argument("--rows", help="a file for the rows")
    options = parser.parse_args()
    worker, counts = Worker(options), collections.defaultdict(collections.Counter)
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open(options.rows, "a")) if options.rows else None
        for op in database():
            name = full_name(op)
            if options.names and not {name, op.name} & set(options.names):
                continue
            for dtype in options.dtypes:
                for variant in options.variants:
                    for state, row, message in worker.rows(name, dtype, variant):
                        counts[dtype, variant][state] += 1
                        if file:
                            print(json.dumps([row, state, message]), file=file, flush=True)
                        if state not in ("right", "right with fallback"):
                            print(f"{state:<8} {row}: {message.splitlines()[0] if message else ''}", flush=True)
    if worker.process is not None:
        worker.stop()
    states = ["right", "right with fallback", "refused", "found", "wrong", "raw", "crash", "timeout"]
    print("\n| | " + " | ".join(states) + " |\n|---" * 1 + "|---" * len(states) + "|")
    for (dtype, variant), found in counts.items():
        print(f"| {dtype}, {variant} | " + " | ".join(str(found[state]) for state in states) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
