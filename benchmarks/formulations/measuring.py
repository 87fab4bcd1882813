"""The times and errors of engines, and tables of them."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from meter import kernel_lines, kernel_times

from torch2rt import TRTModule
from torch2rt.backend.tensorrt import LOG, TORCH_DTYPES, trt

CALLS = 20  # in one CUDA graph
REPLAYS = 25


class BoundEngine:
    """An engine with a context, on fixed inputs and outputs."""

    def __init__(self, plan: bytes, inputs: list[torch.Tensor]) -> None:
        self.module: TRTModule | None = TRTModule.from_engine(plan)
        engine, self.context = self.module.engine, self.module.context
        self.inputs = inputs
        self.outputs: list[torch.Tensor] = []  # in the order of the network
        for name in (engine.get_tensor_name(i) for i in range(engine.num_io_tensors)):
            if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT:
                value = inputs[int(name.rsplit("_", 1)[1])]
                self.context.set_input_shape(name, tuple(value.shape))
            else:
                dtype = TORCH_DTYPES[engine.get_tensor_dtype(name)]
                value = torch.empty(tuple(self.context.get_tensor_shape(name)), dtype=dtype, device="cuda")
                self.outputs.append(value)
            self.context.set_tensor_address(name, value.data_ptr())
        self.stream = torch.cuda.Stream()
        torch.cuda.synchronize()  # the inputs are there

    def enqueue(self) -> None:
        if not self.context.execute_async_v3(self.stream.cuda_stream):
            raise RuntimeError("; ".join(LOG.recent()) or "TensorRT gave no reason")

    def close(self) -> None:
        torch.cuda.synchronize()
        self.context = None
        self.module = None

    def microseconds(self) -> float:
        """The median time of a call."""
        with torch.cuda.stream(self.stream):
            for _ in range(3):
                self.enqueue()
            self.stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                for _ in range(CALLS):
                    self.enqueue()
            times = []
            for turn in range(REPLAYS + 3):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                begin.record(self.stream)
                graph.replay()
                end.record(self.stream)
                end.synchronize()
                if turn >= 3:
                    times.append(begin.elapsed_time(end) / CALLS * 1e3)
        return statistics.median(times)

    def error(self, reference: list[torch.Tensor]) -> float:
        """The largest difference over the largest value."""
        outputs = [value.float().cpu() for value in self.outputs]
        return max(
            float((ours - theirs).abs().max() / theirs.abs().max())
            for ours, theirs in zip(outputs, reference, strict=True)
        )

    def kernel_times(self) -> list[tuple[str, int, float]]:
        """Per call: the name of each kernel, how often it runs, and its microseconds in all."""
        with torch.cuda.stream(self.stream):
            return kernel_times(self.enqueue)


def measure(place: Path, build_only: bool, profiled: bool) -> list[dict[str, Any]]:
    """The rows of one pattern and batch size; what fails is a row with an error."""
    if not (place / "case.pt").exists():
        return [{"formulation": "all", "error": "the worker failed: " + (place / "log").read_text()[-300:]}]
    case = torch.load(place / "case.pt", weights_only=True)
    inputs = [] if build_only else [x.cuda() for x in case["inputs"]]
    rows = []
    for index, name in enumerate(case["names"]):
        path = place / f"{index}.pt"
        row = torch.load(path, weights_only=True) if path.exists() else {"formulation": name, "error": "worker died"}
        plan = row.pop("plan", None)
        if "error" not in row and not build_only:
            try:
                engine = BoundEngine(plan, inputs)
                row["us"] = engine.microseconds()
                row["difference"] = engine.error(case["reference"])
                if profiled:
                    row["kernel_times"] = engine.kernel_times()
                engine.close()
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {str(error).strip()}"[:400]
        rows.append(row)
    return rows


# Tables --------------------------------------------------------------------------------------------------------------


def table(rows: list[dict[str, Any]]) -> None:
    """All rows, pattern by pattern: the time of one block, relative to that of the first formulation."""
    for key, group in _groups(rows).items():
        print(f"\n{key[0]}, batch {key[1]}")
        base = group[0].get("us")
        for row in group:
            if "error" in row:
                print(f"  {row['formulation']:40} failed: {row['error'][:120]}")
                continue
            text = f"  {row['formulation']:40} {row['layers']:5} layers {len(row['kernels']):4} kernels"
            if "us" in row:
                share = f"{row['us'] / base:7.3f}" if base else "      -"
                text += f" {row['us'] / row['places']:10.2f} us {share}   {row['difference']:.1e}"
            print(text)


def short_table(rows: list[dict[str, Any]]) -> None:
    """What beats the converters, and by how much."""
    print("\nfaster than the converters' own by more than 2 %: the best three")
    for (pattern, batch), group in _groups(rows).items():
        if "us" not in group[0]:
            continue
        base = group[0]["us"]
        times = ((row["us"] / base, row["formulation"]) for row in group[1:] if "us" in row and "error" not in row)
        better = sorted(pair for pair in times if pair[0] < 0.98)
        shown = ", ".join(f"{name} {share:.2f}" for share, name in better[:3]) or "-"
        print(f"{pattern:40} {batch:3} {base / group[0]['places']:9.2f} us  {shown}")


def kernel_tables(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        if "kernel_times" not in row:
            continue
        times = row["kernel_times"]
        total, count = sum(us for _, _, us in times), sum(n for _, n, _ in times)
        print(f"\n{row['pattern']}, batch {row['batch']}, {row['formulation']}: {row['us']:.1f} us a call, ", end="")
        print(f"{count} kernels of {total:.1f} us")
        print("\n".join(kernel_lines(times)))


def _groups(rows: list[dict[str, Any]]) -> dict[tuple[str, int], list[dict[str, Any]]]:
    groups: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["pattern"], row["batch"]), []).append(row)
    return groups
