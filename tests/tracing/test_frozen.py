"""Modules of `torch.jit.freeze`, whose graphs refer to functions of a module that may be gone."""

import subprocess
import sys

import torch
from harness import compare

from torch2rt.tracing.patches.torchscript import reloaded

REFUSED = """
import torch, torchvision
from torch2rt import trace

class Selecting(torchvision.models.VisionTransformer):
    def forward(self, x):
        y = self.encoder(self._process_input(x))
        return y[torch.nonzero(y[:, 0, 0] > 0)[:, 0]]

made = Selecting(
    image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=5
)
made.seq_length -= 1
made.encoder.pos_embedding = torch.nn.Parameter(torch.zeros(1, 16, 16))
frozen = torch.jit.freeze(torch.jit.script(made.eval()))
del made
try:
    trace(frozen, [torch.randn(2, 3, 32, 32)])
except Exception as error:
    print("refused", type(error).__name__)
"""


def test_an_error_in_a_frozen_module_does_not_end_the_process(tmp_path):
    script = tmp_path / "frozen.py"  # TorchScript reads the source
    script.write_text(REFUSED)
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0 and "refused" in done.stdout, done.stderr[-2000:]


def test_what_is_reloaded():
    plain = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()).eval()
    scripted = torch.jit.script(plain)
    assert reloaded(plain) is plain and reloaded(scripted) is scripted
    frozen, x = torch.jit.freeze(scripted), torch.randn(2, 3)
    assert reloaded(frozen) is not frozen
    compare(reloaded(frozen)(x), plain(x))
