"""Which products are faster in int8 and fp8 on this GPU, and does torch2rt choose them (`quantization/gain.py`)?

    python benchmarks/quantization_gain.py [--rows 1,4,16,128,2048] [--sizes 64x256,384x1536,768x3072,3072x768]

For each number of rows and each `inputs x outputs`, a chain of four such products, each behind a layer norm and with a
GELU behind it: the median latency of CUDA-graph replays in float16 and quantised, and what the rule says of it. A line
ends with `wrong` where the rule's choice is slower by more than 3 %. Needs a GPU.
"""

from __future__ import annotations

import argparse

import torch
from precision import latency

from torch2rt import passes, torch2rt, trace
from torch2rt.backend.tensorrt import FLAVOUR, VERSION
from torch2rt.passes.order import run
from torch2rt.passes.quantization.formats import FORMATS
from torch2rt.passes.quantization.gain import slower


class Chain(torch.nn.Module):
    """Products of one size one after the other, each of an input of its own."""

    def __init__(self, inputs: int, outputs: int, count: int = 4) -> None:
        super().__init__()
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(inputs) for _ in range(count))
        self.products = torch.nn.ModuleList(torch.nn.Linear(inputs, outputs) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, product in zip(self.norms, self.products, strict=True):
            x = x + torch.nn.functional.gelu(product(norm(x))).mean(-1, keepdim=True)
        return x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="1,4,16,128,2048")
    parser.add_argument("--sizes", default="64x256,128x128,384x384,384x1536,768x768,768x3072,3072x768,4096x4096")
    parser.add_argument("--formats", default="int8")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, {FLAVOUR} {VERSION}")
    print(f"{'rows':>6}{'size':>12}{'fp16 us':>10}{'':>6}{'us':>10}  what the rule says")
    for size in arguments.sizes.split(","):
        inputs, outputs = map(int, size.split("x"))
        module = Chain(inputs, outputs).eval().cuda()
        for rows in map(int, arguments.rows.split(",")):
            x = torch.randn(rows, inputs, device="cuda")
            plain = latency(torch2rt(module, [x], precision="fp16", verify=False), [x])
            graph = run(trace(module, [x]), passes.default())
            for name in arguments.formats.split(","):
                options = dict(calibration=[x], calibration_method="minmax", quantize_all=True, verify=False)
                found = latency(torch2rt(module, [x], precision=name, **options), [x])
                why = next(iter(slower(graph, FORMATS[name], torch.float16).values()), None)
                is_wrong = (plain if why else found) > 1.03 * min(plain, found)
                text = f"  {why or 'faster'}{', wrong' * is_wrong}"
                print(f"{rows:>6}{size:>12}{plain:>10.1f}{name:>6}{found:>10.1f}{text}", flush=True)


if __name__ == "__main__":
    main()
