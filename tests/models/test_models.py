"""Whole models: every torchvision classifier with a dynamic batch, at three batch sizes; segmentation, video and flow.

By default small classifiers of different families and one model each of the rest; `--all-models` takes every one.
"""

import torch
import torchvision
from harness import zoo
from torchvision.models import optical_flow, segmentation, video

from torch2rt import torch2rt

SMALLEST = """
    convnext_tiny googlenet mobilenet_v3_small resnet18 shufflenet_v2_x0_5 squeezenet1_0
""".split()
ROWS = [
    *(
        zoo.Row(
            name,
            lambda name=name: segmentation.__dict__[name](weights=None, weights_backbone=None),
            zoo.images(3, 64, 64),
            quick=name.startswith("lraspp"),
        )
        for name in ("deeplabv3_mobilenet_v3_large", "fcn_resnet50", "lraspp_mobilenet_v3_large")
    ),
    zoo.Row("mvit_v2_s", video.mvit_v2_s, zoo.images(3, 16, 224, 224)),
    zoo.Row("r3d_18", video.r3d_18, zoo.images(3, 8, 32, 32), quick=True),
    zoo.Row("s3d", video.s3d, zoo.images(3, 16, 224, 224)),
    zoo.Row("swin3d_t", video.swin3d_t, zoo.images(3, 4, 32, 32)),
    zoo.Row(
        "raft_small",
        optical_flow.raft_small,
        lambda batch: ([torch.randn(batch, 3, 128, 128) for _ in range(2)], {"num_flow_updates": 2}),
    ),
]
SIZES = {"vit": 224, "maxvit": 224, "inception": 96, "swin": 96}


def classifier(name):
    """A model with random weights in which every layer matters to the result."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(
        name, weights=None, **({"init_weights": True} if "net_v" in name and "google" in name else {})
    )
    size = next((s for key, s in SIZES.items() if name.startswith(key)), 64)
    for parameter in model.parameters():
        if parameter.detach().abs().max() < 1e-4:  # layer scales and zero heads would hide what comes before them
            torch.nn.init.normal_(parameter.data, 0.0, 0.2)
    model.eval()
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    if norms:
        with torch.no_grad():
            model(torch.randn(16, 3, size, size))
    return model.eval(), size


def pytest_generate_tests(metafunc):
    zoo.parametrize(metafunc, ROWS)
    if "name" in metafunc.fixturenames:
        everything = metafunc.config.getoption("--all-models")
        names = torchvision.models.list_models(module=torchvision.models) if everything else SMALLEST
        metafunc.parametrize("name", names)


def test_classifier(name, device):
    model, size = classifier(name)
    model = model.to(device)
    model_trt = torch2rt(model, [torch.randn(2, 3, size, size, device=device)], max_batch_size=4)
    run = model_trt if device.type == "cuda" else model_trt.reference()
    errors = []
    for batch in (1, 2, 3):
        x = torch.randn(batch, 3, size, size, device=device)
        with torch.no_grad():
            expected = model(x)
        actual = run(x)
        assert actual.shape == expected.shape and actual.dtype == expected.dtype
        if batch > 1:
            spread = (expected[0] - expected[1]).abs().max() / expected.abs().max()
            assert spread > 1e-3, "the model hardly looks at its input, so this would not see an error"
        errors.append(((actual - expected).abs().max() / expected.abs().max()).item())
    print(f"{name}: {model_trt.network.num_layers} layers, relative errors {', '.join(f'{e:.1e}' for e in errors)}")
    assert max(errors) < (5e-3 if device.type == "cuda" else 1e-3)  # its kernels round differently, layer upon layer


def test_other_task(row, device):
    zoo.check_row(row, device)
