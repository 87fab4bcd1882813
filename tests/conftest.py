import pytest
import torch


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=["cpu", "cuda"], help="cuda runs the engines; cpu evaluates the networks")


@pytest.fixture(scope="session")
def device(request):
    device = request.config.getoption("--device")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda needs a GPU", returncode=2)
    return torch.device(device)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
