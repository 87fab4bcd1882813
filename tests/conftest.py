import os

# Before anything loads CUDA: float32 is float32, in torch and in TensorRT for RTX, which knows no other way to say it.
os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")

# Tests are of what is built now; those of kept engines say otherwise.
os.environ["TORCH2RT_CACHE_ENGINES"] = "0"

import pytest
import torch


def pytest_addoption(parser):
    parser.addoption(
        "--device", default="cpu", choices=["cpu", "cuda"], help="cuda runs the engines; cpu evaluates the networks"
    )
    parser.addoption(
        "--all-models", action="store_true", help="convert every model of the tables, not a few of each kind"
    )
    parser.addoption("--examples", type=int, default=50, help="how many calls of a kind the drawn tests make")
    parser.addoption("--size-programs", type=int, default=100, help="how many programs test_size_programs.py draws")
    parser.addoption("--processes", type=int, default=6, help="how many processes share a folder of kept engines")
    parser.addoption("--stress", type=int, default=100_000, help="how many calls each test of test_stress.py makes")


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
def _seed():
    torch.manual_seed(0)
