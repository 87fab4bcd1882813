"""Gradients of inputs, by running the module again."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import torch2rt
from torch2rt.errors import InputError


class Branches(nn.Module):
    """Nested arguments and results, an integer result, an input that no result depends on."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x, y, *, scale):
        h = torch.tanh(self.first(x)) * scale["by"]
        return {"scores": self.last(h), "best": self.last(h).argmax(-1), "h": [h, x * 2]}


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 5)

    def forward(self, x):
        h = F.dropout(self.first(x).sin(), 0.4, training=True)
        return self.last(h) * torch.linalg.svdvals(h)[0]


def converted(module, inputs, device, **options):
    model_trt = torch2rt(module, inputs, backward="recompute", **options)
    return model_trt if device.type == "cuda" else model_trt.reference()


def test_gradients_of_nested_inputs(device):
    module = Branches().to(device).eval()
    make = lambda: (torch.randn(4, 3, device=device), torch.randn(4, 2, device=device))  # noqa: E731
    by = torch.tensor([[1.5]], device=device)
    run = converted(module, make(), device, kwargs={"scale": {"by": by}})
    x, y = make()
    grads = []
    for call in (module, run):
        inputs = [value.clone().requires_grad_() for value in (x, y, by)]
        result = call(*inputs[:2], scale={"by": inputs[2]})
        assert not result["best"].requires_grad and result["scores"].requires_grad
        (result["scores"].exp().sum() + (result["h"][0] ** 2).sum() + result["h"][1][0].sum()).backward()
        grads.append([value.grad for value in inputs])
    assert grads[1][1] is None and grads[0][1] is None
    for ours, theirs in zip(grads[1], grads[0], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in run.parameters())
    with torch.no_grad():
        assert not run(*inputs[:2], scale={"by": inputs[2]})["scores"].requires_grad
    assert not run(x, y, scale={"by": by})["scores"].requires_grad


def test_random_numbers_are_the_same_again(device):
    module = Noisy().to(device).train()
    run = converted(
        module, [torch.randn(4, 3, device=device)], device, max_batch_size=9, fallback=True, min_segment_calls=1
    )
    x, results = torch.randn(6, 3, device=device), []
    for call in (module, run):
        torch.manual_seed(3)
        given = x.clone().requires_grad_()
        out = call(given)
        torch.rand(2, device=device)  # whoever draws meanwhile
        out.square().sum().backward()
        results.append((out, given.grad, torch.rand(2, device=device)))
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-3)


def test_a_student_before_a_frozen_head_learns(device):
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)).to(device).eval().requires_grad_(False)
    run = converted(head, [torch.randn(8, 4, device=device)], device)
    x, target, losses = torch.randn(8, 3, device=device), torch.randn(8, 2, device=device), []
    for teacher in (head, run):
        torch.manual_seed(1)
        student = nn.Linear(3, 4).to(device)
        optimizer = torch.optim.SGD(student.parameters(), lr=0.3)
        steps = []
        for _ in range(5):
            optimizer.zero_grad()
            loss = F.mse_loss(teacher(student(x)), target)
            loss.backward()
            optimizer.step()
            steps.append(loss.item())
        losses.append(steps)
    assert losses[1][-1] < losses[1][0]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=1e-3)


def test_copies_have_gradients_and_files_have_none():
    module = nn.Linear(3, 2)
    model_trt = torch2rt(module, [torch.randn(4, 3)], backward="recompute")
    assert copy.deepcopy(model_trt).recomputed is model_trt.recomputed
    file = io.BytesIO()
    torch.save(model_trt, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).recomputed is None
    assert not list(model_trt.parameters()) and list(model_trt.state_dict()) == ["engine", "header"]
    assert torch2rt(module, [torch.randn(4, 3)]).recomputed is None


@pytest.mark.parametrize(
    ("module", "options", "message"),
    [
        (nn.Linear(3, 2), {"backward": "engine"}, "neither None nor 'recompute'"),
        (nn.Linear(3, 2), {"backward": "recompute", "background": True}, "needs the module where the engine is"),
        (nn.BatchNorm1d(3).train(), {"backward": "recompute", "state": "write"}, "for modules without state"),
    ],
)
def test_refused(module, options, message):
    with pytest.raises(InputError, match=message):
        torch2rt(module, [torch.randn(4, 3)], **options)
