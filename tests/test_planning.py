"""Plans: where calls would run, and their shares."""

import json

import pytest
import torch
from torch import nn

from torch2rt import plan, torch2rt
from torch2rt.cli.main import main
from torch2rt.errors import InputError


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Sequential(nn.Linear(6, 30), nn.ReLU(), nn.Linear(30, 7)), nn.Linear(7, 5)

    def forward(self, x):
        y = self.first(x)
        s = torch.linalg.svdvals(y.T @ y)
        return torch.softmax(self.last(y * s), -1) * 2


def test_shares_and_bytes():
    model, x = Model().eval(), torch.randn(4, 6)
    result = plan(model, [x], max_batch_size=8, opt_shapes=[(4, 6)])
    assert [segment.where for segment in result.segments] == ["TensorRT", "torch", "TensorRT"]
    assert [segment.calls for segment in result.segments] == [4, 1, 4]
    products = [4 * 6 * 30 + 4 * 30 * 7 + 7 * 4 * 7, 0, 4 * 7 * 5]
    assert [segment.flops for segment in result.segments] == [2 * n for n in products]
    assert [segment.bytes for segment in result.segments] == [0, 7 * 7 * 4, (4 * 7 + 7) * 4]
    assert result.segments[0].modules[:2] == ["first.0", "first.1"]
    assert result.share_of_calls == pytest.approx(8 / 9) and result.share_of_flops == 1.0
    assert str(result).startswith("2 TensorRT segments with 89% of the calls and 100.0% of the floating-point")
    assert "torch.linalg.svdvals at" in str(result) and "test_planning.py:" in str(result)
    assert json.loads(json.dumps(result.to_json()))["segments"][1]["where"] == "torch"
    report = torch2rt(model, [x], max_batch_size=8, fallback=True).report
    assert report.segments == [segment.text for segment in result.segments]


def test_the_page_has_the_tree_of_the_modules():
    page = plan(Model().eval(), [torch.randn(4, 6)], torch_executed=["first.2"], min_segment_calls=1).html()
    assert "first: 2 of 3 calls" in page and "last: 1 of 1 calls" in page and "http" not in page
    assert page.count("<details") == page.count("</details>") == 2


def test_what_converts_whole_is_one_segment():
    result = plan(nn.Linear(3, 2), [torch.randn(4, 3)])
    assert [segment.where for segment in result.segments] == ["TensorRT"] and result.share_of_calls == 1


def test_wrong_arguments():
    with pytest.raises(InputError, match="torch_executed names nowhere"):
        plan(Model(), [torch.randn(4, 6)], torch_executed=["nowhere"])


def test_command(tmp_path, capsys):
    page = tmp_path / "plan.html"
    command = ["convert", "torchvision:squeezenet1_1", "--input", "1x3x64x64", "--plan", "-o", str(page)]
    assert main([*command, "--max-batch-size", "4"]) == 0
    assert "1 TensorRT segment with 100% of the calls" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").count("</details>") > 3


class Chosen(nn.Module):
    """Layers before and after rows are chosen by their values."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 5)

    def forward(self, x):
        y = torch.relu(self.first(x))
        return torch.tanh(self.last(y[y.sum(1) > 3]))


def test_types_beside_calls_that_torch_keeps():
    found = plan(Chosen(), [torch.randn(9, 6)], min_segment_calls=1, precision="fp16")
    types = {(row.module, row.function.rpartition(".")[2]): row.dtype for row in found.precision.rows}
    assert types["first", "linear"] == types["last", "linear"] == types["", "tanh"] == "float16"
    assert types["", "__getitem__"] == "float32"
