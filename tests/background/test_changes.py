"""What happens to a module until its engine is ready, which is never one of old values, and to its helper."""

import copy
import subprocess
import sys
import threading

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from torch2rt import EngineError, InputError, torch2rt
from torch2rt.background.example import Example, are_alike
from torch2rt.background.job import Job
from torch2rt.background.module import BackgroundModule
from torch2rt.background.sent import Sent

X = torch.tensor([[1.0, -2.0, 3.0], [0.5, 4.0, -1.5]])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.norm, self.drop = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.last, self.tied = nn.Linear(4, 4, bias=False), nn.Linear(4, 4)
        self.tied.weight = self.last.weight
        self.scale, self.tables = 2.0, [torch.ones(4), torch.tensor([1.0, float("nan")])]
        self.odd = {"small": torch.ones(3).to(torch.float8_e4m3fn), "conj": torch.tensor([1 + 2j, 3j]).conj()}
        self.register_buffer("mask", torch.arange(8.0).view(4, 2)[:, 1])

    def forward(self, x):
        y = self.drop(torch.relu(self.norm(self.first(x)))) * self.scale + self.tables[0] + self.mask
        return self.tied(self.last(y))


def step(make):
    def change(net):
        optimizer = make(net.parameters())
        modes = [each.training for each in net.modules()]
        net(X).sum().backward()
        optimizer.step()
        net.zero_grad()
        assert modes == [each.training for each in net.modules()]

    return change


def in_place(write):
    def change(net):
        with torch.no_grad():
            write(net)

    return change


def write_and_restore(net):
    before = net.first.weight.clone()
    net.first.weight.fill_(9)
    net.first.weight.copy_(before)


def forward_in_training(net):
    net.norm.train()
    net(X)
    net.norm.eval()


def other_state(net):
    return {name: x + 1 if x.is_floating_point() else x for name, x in net.state_dict().items()}


class Scaled(nn.Module):
    def forward(self, weight):
        return weight * 2


CHANGES = {
    "nothing": (lambda net: None, ""),
    "written and restored": (in_place(write_and_restore), ""),
    "moved and put back": (lambda net: net.double().float(), ""),
    "shared": (lambda net: net.share_memory(), ""),
    "the same values": (lambda net: net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True), ""),
    "mode and back": (lambda net: net.train().eval(), ""),
    "gradients": (lambda net: net(X).sum().backward(), ""),
    "SGD": (step(lambda p: torch.optim.SGD(p, 0.1)), "first.weight"),
    "foreach": (step(lambda p: torch.optim.Adam(p, 0.1, foreach=True)), "first.weight"),
    "fused": (step(lambda p: torch.optim.Adam(p, 0.1, fused=True)), "first.weight"),
    "data": (lambda net: net.first.bias.data.add_(1), "first.bias"),
    "new data": (lambda net: setattr(net.first.bias, "data", torch.ones(4)), "first.bias"),
    "numpy": (lambda net: net.first.bias.detach().numpy().__setitem__(2, 7), "first.bias"),
    "view": (in_place(lambda net: net.first.weight[1:, ::2].mul_(2)), "first.weight"),
    "base of a buffer": (lambda net: net.mask.as_strided((8,), (1,), 0)[3].fill_(-1), "mask"),
    "tied": (in_place(lambda net: net.tied.weight.add_(1)), "last.weight, tied.weight"),
    "state dict": (lambda net: net.load_state_dict(other_state(net)), "first.bias"),
    "assigned": (lambda net: net.load_state_dict(other_state(net), assign=True), "first.bias"),
    "half": (lambda net: net.half(), "first.bias"),
    "parameter": (lambda net: setattr(net.first, "bias", nn.Parameter(torch.ones(4))), "first.bias"),
    "no parameter": (lambda net: setattr(net.first, "bias", None), "first.bias"),
    "module": (lambda net: setattr(net, "first", nn.Linear(3, 4)), "first.bias"),
    "other module": (lambda net: setattr(net, "drop", nn.Identity()), "drop"),
    "new module": (lambda net: net.add_module("more", nn.ReLU()), "more"),
    "swapped": (lambda net: torch.utils.swap_tensors(net.first.bias, nn.Parameter(torch.ones(4))), "first.bias"),
    "statistics": (forward_in_training, "norm.num_batches_tracked, norm.running_mean"),
    "mode": (lambda net: net.train(), "drop.training"),
    "number": (lambda net: setattr(net, "scale", 2.5), "scale"),
    "list of tensors": (lambda net: net.tables[0].add_(1), "tables.0"),
    "float8": (lambda net: net.odd["small"].data.view(torch.uint8).add_(1), "odd.small"),
    "conjugated": (lambda net: net.odd["conj"].data.add_(1), "odd.conj"),
    "sparse": (lambda net: setattr(net, "sparse", torch.eye(3).to_sparse()), "sparse"),
    "hook": (lambda net: net.last.register_forward_hook(lambda module, args, y: y + 1), "last._forward_hooks"),
    "parametrized": (lambda net: nn.utils.parametrize.register_parametrization(net.first, "weight", Scaled()), "first"),
    "pruned": (lambda net: prune.l1_unstructured(net.first, "weight", 0.5), "first.weight_orig"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CHANGES)
def test_what_has_changed_is_named(name):
    net = Net().eval()
    net(X).sum().backward()
    job = Job(print, net)
    sent = Sent(net, job.numbers)
    job.received = sent.received
    sent.received(job._write())
    job.close()
    assert sent.changed(net) == []
    change, expected = CHANGES[name]
    change(net)
    found = ", ".join(sent.changed(net))
    assert expected in found and bool(found) == bool(expected)


def test_weights_are_those_that_the_helper_has_read():
    """Between the call and its start, a step of a fused optimizer leaves no other trace than values."""
    net = Net().eval()
    job = Job(print, net)
    sent = Sent(net, job.numbers)
    job.received = sent.received
    net.first.bias.data.add_(1)
    storages = job._write()
    net.last.weight.data.add_(1)
    sent.received(storages)
    job.close()
    assert sent.changed(net) == ["last.weight", "tied.weight"]


def test_the_engine_is_not_used_then():
    net = Net().eval()
    sent = Sent(net, {})
    model = BackgroundModule(net, lambda: net.drop.train() and None, watched=sent)
    with pytest.raises(EngineError, match=r"the engine is of the module as it was, and drop\.training has changed"):
        model.wait(60)
    assert not model.ready


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_who_waits_is_told_whatever_ends_the_thread(error):
    def make():
        raise error

    model = BackgroundModule(nn.ReLU(), make)
    with pytest.raises(EngineError, match=type(error).__name__):
        model.wait(60)


def test_what_is_stopped_is_not_used():
    """Also where nothing can be interrupted, as in the loading of a file."""
    go = threading.Event()
    model = BackgroundModule(nn.ReLU(), lambda: go.wait(60) and None)
    model.stop()
    go.set()
    with pytest.raises(EngineError, match="was stopped"):
        model.wait(60)


def test_without_a_python_to_start(monkeypatch):
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    with pytest.raises(InputError, match="there is none to start"):
        torch2rt(nn.ReLU(), [X], background=True)


# What the helper computes --------------------------------------------------------------------------------------------

RESULTS = [
    ([X], [X.clone()], True),
    ([X], [X + 0.02], True),
    ([X], [X + 0.2], False),
    ([X], [X.double()], False),
    ([X], [X[:1]], False),
    ([X], [X, X], False),
    ([X / 0], [X / 0], True),
    ([X * float("nan")], [X * float("nan")], True),
    ([X], [X * float("nan")], False),
    ([X > 0], [X > 0], True),
    ([X > 0], [X < 0], False),
    ([torch.arange(30)], [torch.arange(30).index_fill(0, torch.tensor([4]), 9)], True),
    ([X.half()], [X.half() + 0.05], True),
    ([X[:0]], [X[:0]], True),
    ([X + 1j], [X + 2j], False),
]


@pytest.mark.parametrize(("ours", "theirs", "expected"), RESULTS)
def test_results_are_alike_but_for_roundings(ours, theirs, expected):
    assert are_alike(ours, theirs) == expected


def test_a_module_that_draws_is_not_compared(tmp_path):
    net, file = Net().train(), tmp_path / "example"
    Example(net, (X,), {}).write(file)
    assert torch.load(file)["results"] is None
    Example(net.eval(), (X,), {}).write(file)
    found = torch.load(file)
    Example(net, (X,), {}).check(found)
    net.scale = 3.0
    with pytest.raises(EngineError, match="computes something else than here"):
        Example(net, (X,), {}).check(found)


class Caching(nn.Module):
    """What its calls write to says nothing of what it computes."""

    def __init__(self):
        super().__init__()
        self.linear, self.calls, self.shapes, self.scale = nn.Linear(3, 4), 0, [], 2.0

    def forward(self, x):
        self.calls += 1
        self.shapes.append(len(x))
        self.table, self.rows = [torch.arange(4.0) * len(x)], len(x)
        return self.linear(x) * self.scale


def test_what_calls_write_to_is_no_change(tmp_path):
    net = nn.Sequential(Caching(), nn.ReLU())
    net(X)
    sent = Sent(net, {})
    Example(copy.deepcopy(net), (X,), {}).write(tmp_path / "example")
    written = torch.load(tmp_path / "example")["written"]
    assert written == ["0.calls", "0.rows", "0.shapes", "0.table"]
    net(X[:1])
    assert sent.changed(net) == ["0.calls", "0.rows", "0.shapes", "0.table.0"]
    sent.written_by_calls = frozenset(written)
    assert sent.changed(net) == []
    net[0].scale = 3.0
    assert sent.changed(net) == ["0.scale"]


SCRIPT = """
import functools, os, signal, sys, time, torch
from torch import nn
from torch.nn.utils import prune
from torch2rt import EngineError, torch2rt
from torch2rt.background import job
from torch2rt.background.module import BackgroundModule

print = functools.partial(print, flush=True)  # a process that is forked must not have it in its buffer, too
job.POLITE = 0
x, offset = torch.randn(2, 3), 3.0

class Here(nn.Module):
    def __init__(self):
        super().__init__()
        factor = 2.5
        self.linear, self.function = nn.Linear(3, 5), lambda y: y * factor + offset
        self.register_forward_hook(lambda module, args, y: y - 1)

    def forward(self, x):
        return self.function(self.linear(x))

print("once")
nn.Hardshrink.forward = lambda self, x: x * 7  # which the helper does not know
module, example = nn.Sequential(Here(), nn.Hardshrink()).eval(), x.clone()
model = torch2rt(module, [example], background=True)
example.fill_(float("nan"))  # the caller's own
os.chdir("/")
os.environ["PYTHONPATH"], sys.path[:] = "/dev/null/none", []
signal.signal(signal.SIGINT, signal.SIG_IGN)
os.killpg(os.getpgrp(), signal.SIGINT)  # as Ctrl-C in a terminal
if not (pid := os.fork()):
    try:
        model.wait()
    except EngineError as error:
        print(error)
    sys.exit(0)
print(os.waitpid(pid, 0)[1])
try:
    model.wait(300)
except EngineError as error:
    print(error)
print(open(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read())

class Slow:  # it is in C++ when Python ends
    def warm_up(self):
        y = torch.randn(1000, 1000)
        for _ in range(20):
            y = (y @ y) / 99

late = BackgroundModule(nn.ReLU(), Slow)
time.sleep(0.05)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="sends signals, forks, and looks for processes")
def test_a_script_on_standard_input():
    """It has no file and no guard, and does what scripts do. The helper finds out that a class is another one there."""
    command = [sys.executable, "-"]
    run = subprocess.run(
        command, input=SCRIPT, capture_output=True, text=True, check=False, timeout=600, start_new_session=True
    )
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and "terminate called" not in run.stderr, f"{run.stdout}\n{run.stderr}"
    assert lines[0] == "once" and "forked from" in lines[1] and lines[2] == "0"
    assert "the module computes something else than here" in lines[3] and lines[4:] == [""]
