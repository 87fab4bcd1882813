"""Modules that answer at once: what runs before the engine is ready, the switch, and what goes wrong."""

import copy
import gc
import logging
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest
import torch

from torch2rt import BuildError, EngineError, InputError, TRTModule, save, torch2rt
from torch2rt.background.job import Job
from torch2rt.background.module import BackgroundModule
from torch2rt.runtime.converted import Converted

PATIENCE = 120  # seconds for a process to start, on a machine that has much to do


class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("rows", torch.arange(12.0, dtype=torch.bfloat16).reshape(4, 3)[1:])
        self.register_buffer("none", torch.empty(0, 2))

    def forward(self, x):
        return torch.relu(self.second(self.first(x))) + self.rows[0].float()


class Engine(Converted):
    """In the place of a `TRTModule`: it computes the module's result plus 100."""

    cuda_graph = False

    def __init__(self, warm=lambda: None):
        super().__init__()
        self.warm = warm

    def warm_up(self):
        self.warm()

    def forward(self, x):
        return x + 100

    def __reduce__(self):
        return Engine, ()


class Adding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return x + self.one


X = torch.zeros(2)


def test_calls_run_the_module_until_the_engine_is_ready():
    go, seen = threading.Event(), []
    model = BackgroundModule(Adding(), lambda: go.wait(PATIENCE) and Engine(), on_ready=seen.append)
    y = model(X)
    assert y.tolist() == [1, 1] and not y.requires_grad and not model.ready and model.converted is None
    with pytest.raises(TimeoutError, match=r"not ready after 0\.01 s"):
        model.wait(0.01)
    for what in (lambda: model.input_names, lambda: model.report, model.state_dict, lambda: copy.deepcopy(model)):
        with pytest.raises(EngineError, match=r"not built yet, so .* is not known: call wait\(\)"):
            what()
    go.set()
    assert model.wait(PATIENCE) is model.converted and model.ready and model.error is None
    assert model(X).tolist() == [100, 100] and "runs the engine" in repr(model)
    assert type(pickle.loads(pickle.dumps(model))) is Engine
    with pytest.raises(InputError, match="not a Engine"):  # so it is the engine that would be saved
        save(model, "nowhere")
    while not seen:
        time.sleep(0.01)
    assert seen == [model]


def test_every_call_around_the_switch_is_answered():
    model = BackgroundModule(Adding(), lambda: time.sleep(0.05) or Engine())
    wrong, after = [], []

    def call():
        switched = False
        for _ in range(100_000):
            y = model(X)[0].item()
            switched = switched or y == 100
            if y != (100 if switched else 1):
                wrong.append(y)
            if switched and len(after) > 100:
                return
            after.append(switched) if switched else None

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and model.ready


def test_a_callback_that_fails_is_told_once(caplog):
    with caplog.at_level(logging.ERROR, "torch2rt"):
        model = BackgroundModule(Adding(), Engine, on_ready=lambda model: 1 / 0)
        assert isinstance(model.wait(PATIENCE), Engine)
        while "on_ready= has failed" not in caplog.text:
            time.sleep(0.01)
    assert model.ready and model.error is None and model(X).tolist() == [100, 100] and len(caplog.records) == 1


def test_as_a_part_of_a_module_that_is_trained_and_moved():
    """It has no parameters of its own; what its module becomes meanwhile, its engine is not of."""
    go = threading.Event()
    model = BackgroundModule(Adding(), lambda: go.wait(PATIENCE) and Engine())
    outer = torch.nn.Sequential(model, torch.nn.Linear(2, 2)).train()
    assert [name for name, _ in outer.named_parameters()] == ["1.weight", "1.bias"]
    with pytest.raises(EngineError, match="its state dict is not known"):
        outer.state_dict()
    outer.half()
    assert model(X.half()).dtype == torch.half
    go.set()
    with pytest.raises(EngineError, match="and one has changed since"):
        model.wait(PATIENCE)


def raises(error):
    def make():
        raise error

    return make


FAILED = {
    "build": (raises(BuildError("no")), BuildError, "no"),
    "warm-up": (lambda: Engine(raises(EngineError("no GPU"))), EngineError, "no GPU"),
    "bug": (lambda: 1 / 0, ZeroDivisionError, "division"),
}


@pytest.mark.parametrize("name", FAILED)
def test_without_an_engine_the_module_goes_on(name, caplog):
    make, kind, message = FAILED[name]
    seen = []
    with caplog.at_level(logging.ERROR, "torch2rt"):
        model = BackgroundModule(Adding(), make, on_ready=seen.append)
        with pytest.raises(kind, match=message):
            model.wait(PATIENCE)
        for _ in range(3):
            assert model(X).tolist() == [1, 1]
    assert [r.levelname for r in caplog.records] == ["ERROR"], "it is reported once"
    assert "so Adding goes on to run" in caplog.text and message in caplog.text
    assert not model.ready and not seen and isinstance(model.error, kind) and message in repr(model)
    assert (model.converted is not None) == (name == "warm-up")


@pytest.mark.parametrize("change", ["add_", "replaced", "data"])
def test_weights_that_change_meanwhile_keep_the_engine_out(change):
    go, module = threading.Event(), Adding()
    model = BackgroundModule(module, lambda: go.wait(PATIENCE) and Engine())
    with torch.no_grad():
        if change == "add_":
            module.one.add_(4)
        elif change == "replaced":
            module.one = torch.nn.Parameter(torch.full((1,), 5.0))
        else:
            module.one.data = torch.full((1,), 5.0)
    go.set()
    with pytest.raises(EngineError, match="the engine is of the module as it was, and one has changed since"):
        model.wait(PATIENCE)
    assert model(X).tolist() == [5, 5]


def test_a_module_that_nobody_needs_is_let_go_of():
    stopped, go = threading.Event(), threading.Event()
    model = BackgroundModule(Adding(), lambda: go.wait(PATIENCE), stop=stopped.set)
    del model
    gc.collect()
    assert stopped.is_set()
    go.set()


REFUSED = [
    (dict(background=1), "background=1 is neither"),
    (dict(on_ready=print), r"on_ready= .* needs background=True"),
    (dict(background=True, on_ready=3), "on_ready= is a function"),
    (dict(background=True, on_stage=print), "on_stage= is given graphs"),
    (dict(background=True, state="write"), "state= is not for background=True"),
    (dict(background=True, precision="fp17"), "precision='fp17' is not one of"),
    (dict(background=True, merge="maybe"), "merge='maybe'"),
    (dict(background=True, precision="int8", calibration=(x for x in [X])), "cannot pickle 'generator' object"),
    (dict(background=True, configure=threading.Lock()), r"cannot pickle '_thread\.lock' object"),
]


@pytest.mark.parametrize(("options", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_what_cannot_be_done_in_the_background_is_refused_at_once(options, message):
    with pytest.raises(InputError, match=message):
        torch2rt(Adding(), [X], **options)
    with pytest.raises(TypeError):
        torch2rt(Adding(), [X], [X], background=True)


# The helper ----------------------------------------------------------------------------------------------------------


def test_a_conversion_in_a_helper_process(monkeypatch):
    """It is the one that this process makes: weights, also shared and narrow ones, arrive as they are."""
    monkeypatch.setattr(TRTModule, "warm_up", lambda self: None)
    monkeypatch.setattr(TRTModule, "forward", lambda self, x: "the engine ran")
    module, x = Tied().eval(), torch.randn(2, 3)
    options = dict(max_batch_size=4, input_names=["tokens"])
    model = torch2rt(module, [x], background=True, cuda_graph=True, **options)
    with torch.no_grad():
        assert torch.equal(model(x), module(x))
    converted = model.wait(PATIENCE)
    here = torch2rt(module, [x], progress=False, **options)
    assert converted.interface == here.interface and converted.built.facts["layers"] == here.built.facts["layers"]
    assert converted.report.verified.by == here.report.verified.by and converted.cuda_graph is True
    assert [d.error for d in converted.report.verified.differences] == [
        d.error for d in here.report.verified.differences
    ]
    assert len(converted.engine_bytes) == len(here.engine_bytes)
    assert model(x) == "the engine ran"


def test_the_switch_on_a_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs the engine: needs --device cuda")
    module, x = Tied().eval().to(device), torch.randn(2, 3, device=device)
    with torch.no_grad():
        expected = module(x)
    model = torch2rt(module, [x], background=True, max_batch_size=4)
    while not model.ready and model.error is None:
        torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    assert "the engine on" in model.wait().report.verified.by
    torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-3)


def leave_facts(folder, module, tensors):
    torch.save(
        {
            "same": module.first.weight is module.second.weight,
            "view": module.rows,
            "none": module.none,
            "tensors": tensors,
            "tf32": torch.backends.cuda.matmul.allow_tf32,
        },
        folder / "facts",
    )
    raise KeyError("the end", 7)


@pytest.fixture
def tf32():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.usefixtures("tf32")
def test_what_a_helper_is_given_and_what_it_raises():
    module, base = Tied(), torch.randn(4, 5)
    given = [base[1:], base.t(), torch.tensor(3), torch.tensor([True, False]), torch.empty(0)]
    job = Job(leave_facts, module, given)
    try:
        with pytest.raises(KeyError) as caught:
            job.run()
        assert caught.value.args == ("the end", 7)
        facts = torch.load(job.folder / "facts")
    finally:
        job.close()
    assert facts["same"] and facts["tf32"] and torch.equal(facts["view"], module.rows) and facts["none"].shape == (0, 2)
    for ours, theirs in zip(given, facts["tensors"], strict=True):
        assert ours.dtype == theirs.dtype and ours.stride() == theirs.stride() and torch.equal(ours, theirs)
    assert facts["tensors"][0].untyped_storage().data_ptr() == facts["tensors"][1].untyped_storage().data_ptr()
    assert not job.folder.exists()


def sleep(folder):
    time.sleep(600)


def test_a_helper_is_stopped():
    """As it is when its module is let go of, and when Python ends."""
    job, errors = Job(sleep), []

    def run():
        try:
            job.run()
        except EngineError as error:
            errors.append(str(error))

    thread = threading.Thread(target=run)
    thread.start()
    while job.process is None:
        time.sleep(0.01)
    job.stop()
    thread.join(PATIENCE)
    assert job.process.returncode and not job.folder.exists() and "was stopped" in errors[0]
    job.stop()
    late = Job(sleep)
    late.stop()
    with pytest.raises(EngineError, match="was stopped"):
        late.run()


SCRIPT = """
import os, sys, time, torch
from torch2rt.background.job import Job
import threading

class Here(torch.nn.Module):  # as in a notebook: no file can be imported that has it
    def forward(self, x):
        return x * 2

def work(folder, module, x):
    assert torch.equal(module(x), x * 2)
    print("helper", os.getpid(), folder, flush=True)
    time.sleep(600)

print("no guard against running the script again", flush=True)
job = Job(work, Here(), torch.ones(3))
threading.Thread(target=job.run, daemon=True).start()
while sys.stdin.readline().strip() != "END":
    pass
os.kill(os.getpid(), 9)
"""


@pytest.mark.skipif(os.name != "posix", reason="it looks for processes as POSIX has them")
def test_a_helper_ends_with_its_parent(tmp_path):
    (tmp_path / "script.py").write_text(textwrap.dedent(SCRIPT))
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "script.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline().startswith("no guard")
    kind, pid, folder = process.stdout.readline().split()
    assert kind == "helper" and Path(folder).exists()
    process.stdin.write("END\n")
    process.stdin.flush()
    process.wait(PATIENCE)
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and (_is_alive(int(pid)) or Path(folder).exists()):
        time.sleep(0.05)
    assert not _is_alive(int(pid)) and not Path(folder).exists()


def _is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
