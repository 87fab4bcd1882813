"""Minutes of traffic on a GPU, as a service has it: other shapes, files loaded anew, weights refitted, eight threads.

    python benchmarks/soak.py --minutes 10

Threads call one module, each on a stream of its own, with other shapes and values all the time. Every answer is
compared with eager's. Meanwhile another thread saves the module and loads it again, swaps it in, and lets the old one
go. Where engines can be refitted, a third changes the weights of a module of its own, refits its engine and compares.
At the end it says how many calls there were, how many answers were wrong, how many errors there were, and how much more
the process and the GPU hold than after the first tenth of the time.
"""

import argparse
import gc
import json
import random
import tempfile
import threading
import time
from pathlib import Path

import torch

from torch2rt import load, save, torch2rt

ALLOWED = 2e-2  # of the largest number: convolutions in TF32
CHANNELS = 16


class Net(torch.nn.Module):
    """A small network with a dynamic batch and size; `offset` says which weights it has."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.second = torch.nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, stride=2)
        self.head = torch.nn.Linear(CHANNELS, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class Traffic:
    """A module that threads call, and what they find."""

    def __init__(self, device, cuda_graph):
        self.device = device
        self.eager = Net().eval().to(device)
        self.x = torch.randn(4, 3, 32, 32, device=device)
        shapes = {"min_shapes": [(1, 3, 16, 16)], "opt_shapes": [(4, 3, 32, 32)], "max_shapes": [(8, 3, 64, 64)]}
        self.options = dict(**shapes, progress=False, cuda_graph=cuda_graph)
        self.model = torch2rt(self.eager, [self.x], **self.options)
        self.calls, self.wrong, self.errors, self.reloads, self.refits = 0, 0, [], 0, 0
        self.stopped = threading.Event()

    def call(self, seed):
        """One thread's calls."""
        draw = random.Random(seed)
        stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with torch.cuda.stream(stream), torch.no_grad():
            while not self.stopped.is_set():
                try:
                    shape = draw.randint(1, 8), 3, draw.choice((16, 24, 32, 48, 64)), draw.choice((16, 40, 64))
                    x = torch.randn(shape, device=self.device)
                    ours, theirs = self.run(x), self.eager(x)
                    if (ours - theirs).abs().max() > ALLOWED * theirs.abs().max():
                        self.wrong += 1
                    self.calls += 1
                except Exception as error:
                    self.errors.append(f"{type(error).__name__}: {error}")

    def run(self, x, model=None):
        model = model or self.model
        return model(x) if self.device.type == "cuda" else model.reference()(x)

    def change(self, seconds):
        """Load the module anew, and refit it, every few seconds."""
        with tempfile.TemporaryDirectory() as folder:
            while not self.stopped.wait(seconds):
                try:
                    path = Path(folder) / f"{self.reloads % 2}.t2rt"
                    save(self.model, path, inputs=[self.x], source=self.device.type == "cpu")
                    loaded = load(path, verify=self.device.type == "cuda")
                    loaded.cuda_graph = self.options["cuda_graph"]
                    if self.device.type == "cuda":
                        loaded.warm_up()
                    self.model = loaded
                    self.reloads += 1
                    del loaded
                    gc.collect()
                except Exception as error:
                    self.errors.append(f"{type(error).__name__}: {error}")

    def refit(self):
        """Refits of a module of its own, each compared with eager at once; `False` where there is no refit."""
        module = Net().eval().to(self.device)
        try:
            model = torch2rt(module, [self.x], **self.options, refittable=True)
        except Exception as error:
            print(f"no refit here: {error}", flush=True)
            return False
        while not self.stopped.wait(1):
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.02)
            try:
                model.refit()
                with torch.no_grad():
                    ours, theirs = self.run(self.x, model), module(self.x)
                self.wrong += int((ours - theirs).abs().max() > ALLOWED * theirs.abs().max())
                self.refits += 1
            except Exception as error:
                self.errors.append(f"{type(error).__name__}: {error}")
        return True


def held(device):
    """MiB that the process and the GPU hold."""
    status = Path("/proc/self/status").read_text()
    process = next(int(line.split()[1]) / 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    if device.type != "cuda":
        return process, 0.0
    free, total = torch.cuda.mem_get_info(device)
    return process, (total - free) / 2**20


def soak(minutes, threads=8, every=2.0, cuda_graph=True, device="cuda"):
    """What a soak of so many minutes has found."""
    traffic = Traffic(torch.device(device), cuda_graph)
    work = [threading.Thread(target=traffic.call, args=(i,)) for i in range(threads)]
    work.append(threading.Thread(target=traffic.change, args=(every,)))
    work.append(threading.Thread(target=traffic.refit))
    for thread in work:
        thread.start()
    end, seen = time.monotonic() + 60 * minutes, []
    while time.monotonic() < end:
        time.sleep(min(10.0, 6 * minutes))
        seen.append(held(traffic.device))
        print(f"{traffic.calls} calls, {traffic.wrong} wrong, {len(traffic.errors)} errors, {seen[-1]} MiB", flush=True)
    traffic.stopped.set()
    for thread in work:
        thread.join()
    early = seen[len(seen) // 10]
    return {
        "calls": traffic.calls,
        "wrong": traffic.wrong,
        "errors": len(traffic.errors),
        "first errors": traffic.errors[:3],
        "reloads": traffic.reloads,
        "refits": traffic.refits,
        "growth of the process, MiB": round(seen[-1][0] - early[0], 1),
        "growth of the GPU, MiB": round(seen[-1][1] - early[1], 1),
    }


def main(argv=None):
    parser = argparse.ArgumentParser(description="Minutes of traffic on a GPU.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu evaluates the reference")
    parser.add_argument("--json", help="write the result to a file")
    arguments = parser.parse_args(argv)
    result = soak(arguments.minutes, arguments.threads, device=arguments.device)
    print(json.dumps(result, indent=2))
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(result), encoding="utf-8")
    return result


if __name__ == "__main__":
    main()
