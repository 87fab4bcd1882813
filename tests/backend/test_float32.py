"""What torch's switches say of float32, whichever of them were used."""

from types import SimpleNamespace

import pytest
import torch

from torch2rt import torch2rt
from torch2rt.backend import float32


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        (True, None, True),  # of a torch without new switches
        (False, None, False),
        (True, SimpleNamespace(fp32_precision="ieee"), False),
        (False, SimpleNamespace(fp32_precision="tf32"), True),
        (False, SimpleNamespace(fp32_precision="none"), False),
    ],
)
def test_new_switches_come_first(old, new, expected):
    assert float32._is_tf32(SimpleNamespace(allow_tf32=old), new) == expected


def test_switches_of_both_kinds():
    """Torch raises where an old one is read after a new one was used; a conversion reads both."""
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("this torch has old switches only")
    before = float32.tf32_switches()
    assert before[2]
    try:
        matmul.fp32_precision = "tf32"
        assert float32.products_in_tf32() and float32.tf32_switches() == (True, before[1], False)
        torch2rt(torch.nn.Linear(3, 5), [torch.randn(2, 3)])
        float32.put_tf32(False, before[1], False)
        assert not float32.products_in_tf32()
    finally:
        matmul.fp32_precision = "ieee"
        matmul.allow_tf32 = before[0]
    assert float32.tf32_switches()[0] == before[0]
