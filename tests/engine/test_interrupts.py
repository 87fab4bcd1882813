"""Ctrl-C ends a conversion at once, whatever it is doing, and nothing is left half done."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

import torch2rt.engine.build as building
from torch2rt import build, lower, trace
from torch2rt.backend.tensorrt import trt
from torch2rt.interrupts import interruptible

posix = pytest.mark.skipif(os.name != "posix", reason="sends signals as a terminal does on POSIX")


def interrupt_after(seconds):
    threading.Timer(seconds, os.kill, [os.getpid(), signal.SIGINT]).start()


def test_a_call_has_its_result_and_its_errors():
    assert interruptible(lambda: 3, lambda: None) == 3
    with pytest.raises(KeyError, match="its own"):
        interruptible(lambda: {}["its own"], lambda: None)


@posix
@pytest.mark.parametrize("listens", [True, False])
def test_a_call_is_interrupted_whether_it_listens_or_not(listens):
    cancelled, ended = threading.Event(), threading.Event()

    def call():
        (cancelled if listens else ended).wait(10)

    start = time.monotonic()
    interrupt_after(0.2)
    with pytest.raises(KeyboardInterrupt):
        interruptible(call, cancelled.set)
    assert cancelled.is_set() and time.monotonic() - start < 1.2
    ended.set()


@posix
@pytest.mark.skipif(not hasattr(trt, "IProgressMonitor"), reason="this TensorRT tells nothing of a build")
def test_an_interrupted_build_ends_and_another_may_follow(monkeypatch):
    network = lower(trace(torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU()), [torch.randn(1, 3, 8, 8)]))
    told = []

    class Interrupted(building._Monitor):
        def step_complete(self, name, step):
            if not told:
                os.kill(os.getpid(), signal.SIGINT)
                while not self._is_cancelled:
                    time.sleep(0.01)
            told.append(super().step_complete(name, step))
            return told[-1]

    with monkeypatch.context() as patch:
        patch.setattr(building, "_Monitor", Interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(network)
    assert told and not any(told)
    assert build(network)


def test_a_build_in_another_thread_works_too():
    network, engines = lower(trace(torch.nn.ReLU(), [torch.randn(2, 3)])), []
    thread = threading.Thread(target=lambda: engines.append(build(network, progress=True)))
    thread.start()
    thread.join()
    assert len(engines) == 1


SCRIPT = """
import os, signal, sys, threading, time
from torch2rt.interrupts import interruptible

threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGINT]).start()
import atexit
atexit.register(print, "the end of all else", flush=True)
try:
    interruptible(lambda: time.sleep({seconds}), lambda: None)
except KeyboardInterrupt:
    {then}
"""


@posix
@pytest.mark.parametrize(
    ("seconds", "then", "code", "limit"),
    [(60, "raise", -signal.SIGINT, 5), (2, "sys.exit(3)", 3, 20)],
    ids=["uncaught", "caught"],
)
def test_python_ends_as_it_should_with_a_call_that_does_not(seconds, then, code, limit):
    start = time.monotonic()
    script = SCRIPT.format(seconds=seconds, then=then)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert ran.returncode == code, ran.stderr
    assert ran.stdout == "the end of all else\n"
    assert ("KeyboardInterrupt" in ran.stderr) == (then == "raise")
    assert (seconds > 10 or time.monotonic() - start > seconds) and time.monotonic() - start < limit


@posix
def test_the_command_line_ends_with_130_and_one_line(tmp_path):
    (tmp_path / "slow.py").write_text(
        "import time, torch\n"
        "class Slow(torch.nn.Module):\n"
        "    def forward(self, x):\n"
        "        print('tracing', flush=True)\n"
        "        time.sleep(60)\n"
    )
    command = [sys.executable, "-m", "torch2rt.cli.main", "convert", "slow:Slow", "--input", "2x3", "-o", "slow.engine"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "tracing" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert process.communicate()[1] == "torch2rt: interrupted\n"
    assert process.returncode == 130 and time.monotonic() - start < 3
    assert [p.name for p in tmp_path.iterdir() if p.name != "__pycache__"] == ["slow.py"]
