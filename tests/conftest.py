import gc
import logging
import os

# Before anything loads CUDA: float32 is float32, in torch and in TensorRT for RTX, which knows no other way to say it.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

# Tests are of what is built now; those of kept engines say otherwise.
os.environ["TORCH2RT_CACHE_ENGINES"] = "0"

from pathlib import Path

import pytest
import torch
from harness.cases import Case
from harness.reached import REACHED, missing

# Pytest puts a handler at each logger that does not propagate, three times a test. One of them makes torch describe all
# that it does with sizes.
for _logger in logging.root.manager.loggerDict.values():
    if isinstance(_logger, logging.Logger):
        _logger.propagate = True

UNREACHED = pytest.StashKey[list[str]]()


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda runs the engines; cpu evaluates the networks"
    )
    parser.addoption(
        "--all-models", action="store_true", help="convert every model of the tables, not a few of each kind"
    )
    parser.addoption(
        "--every-row", action="store_true", help="static sizes for every row of the converters' tables, as on a GPU"
    )
    parser.addoption("--examples", type=int, default=12, help="how many calls of a kind the drawn tests make")
    parser.addoption("--corruptions", type=int, default=200, help="how many damaged files test_saving.py makes of one")
    parser.addoption("--size-programs", type=int, default=40, help="how many programs test_size_programs.py draws")
    parser.addoption(
        "--changed-rows", type=int, default=3, help="rows of which test_graph_key_rows.py changes one; 0: all"
    )
    parser.addoption("--processes", type=int, default=3, help="how many processes share a folder of kept engines")
    parser.addoption("--stress", type=int, default=100_000, help="how many calls each test of test_stress.py makes")


def pytest_collection_modifyitems(config, items):
    """Where no engine runs, rows like one before them are converted with dynamic sizes alone."""
    if config.getoption("--device") == "cuda" or config.getoption("--every-row") or any("::" in a for a in config.args):
        return
    said, others = [], []
    for item in items:
        (said if is_said_before(getattr(item, "callspec", None)) else others).append(item)
    if said:
        config.hook.pytest_deselected(items=said)
        items[:] = others


def pytest_collection_finish(session):
    """What was imported and the tables of rows stay: few collections of garbage need look at them.

    They are not frozen, as the tracer finds the caches of functions among what is collected.
    """
    gc.collect()
    gc.set_threshold(700, 10, 200)


def is_said_before(spec):
    """Whether these are static sizes of a row whose callable was converted with some, and is with dynamic ones here."""
    row, mode = (spec.params.get(name) for name in ("row", "mode")) if spec else (None, None)
    return isinstance(row, Case) and mode == "static" and "dynamic" in row.modes and not row.is_new


@pytest.fixture(scope="session")
def device(request):
    device = request.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda needs a GPU", returncode=2)
    return torch.device(device)


@pytest.fixture
def without_gpu_memory(monkeypatch):
    """Outputs of calls and replays are the CPU's: what they do on the host, with the GPU's part left out."""
    from torch2rt.runtime import cuda_graph, execution, graph_memory

    for file in (cuda_graph, execution, graph_memory):
        monkeypatch.setattr(file, "empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype))
        monkeypatch.setattr(file, "LOWEST_ADDRESS", 1, raising=False)  # the CPU's memory may begin below a GPU's


@pytest.fixture(autouse=True)
def _helpers_are_not_starved(monkeypatch):
    """Helper processes have the priority of the tests, which take every core."""
    monkeypatch.setattr("torch2rt.background.job.POLITE", 0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


# Every converter has a row that reaches it: known when all rows have run, in one process or several.

ALL_ROWS = Path(__file__).parent / "converters"


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_testnodedown(node, error):
    REACHED.update(map(tuple, getattr(node, "workeroutput", {}).get("reached", ())))


def pytest_sessionfinish(session):
    config = session.config
    if hasattr(config, "workeroutput"):
        config.workeroutput["reached"] = sorted(map(list, REACHED))
        return
    selected = any(config.getoption(name, None) for name in ("keyword", "markexpr", "deselect", "lf", "collectonly"))
    folders = [Path(arg).resolve() for arg in config.args]
    whole = any(
        "::" not in arg and folder in (ALL_ROWS, *ALL_ROWS.parents) for arg, folder in zip(config.args, folders)
    )
    if whole and not selected and (names := missing(REACHED)):
        config.stash[UNREACHED] = names
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    for name in terminalreporter.config.stash.get(UNREACHED, ()):
        terminalreporter.write_line(f"no row reaches the converter {name}", red=True)
