"""What `keep_fp32`, `force_low` and `keep_float` mean: every form, and what names a wrong one."""

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from torch2rt import InputError, passes, torch2rt, trace
from torch2rt.passes.order import run
from torch2rt.passes.selection import select


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.drop, self.down, self.unused = nn.Linear(6, 7), nn.Identity(), nn.Linear(7, 6), nn.Linear(3, 3)

    def forward(self, x):
        return self.down(self.drop(F.gelu(self.up(x))))


class Outer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.ModuleDict({"mlp": Inner(), "norm": nn.LayerNorm(6)}) for _ in range(2)])
        self.extra, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x):
        if x.shape[0] > 3:
            x = self.extra(x)
        for layer in self.layers:
            x = x + layer["mlp"](layer["norm"](x))
        return self.head(x).softmax(-1)


MODEL, X = Outer().eval(), torch.randn(5, 6)
MODULES = dict(MODEL.named_modules())
LAYER = [f"layers.{i}.norm" for i in (0, 1)]
MLP = [f"layers.{i}.mlp{part}" for i in (0, 1) for part in (".up", "", ".down")]
# Items, and the modules whose calls they mean.
MEANT = {
    "a path": (["head"], ["head"]),
    "a path alone": ("head", ["head"]),
    "a path around others": (["layers.1"], [LAYER[1], *MLP[3:]]),
    "a pattern": (["layers.*.mlp"], MLP),
    "a pattern with places": (["layers.[0-9].mlp.?p"], [MLP[0], MLP[3]]),
    "a module": ([MODEL.layers[0]["mlp"]], MLP[:3]),
    "a module alone": (MODEL.head, ["head"]),
    "a class": ([nn.LayerNorm], LAYER),
    "a class alone": (Inner, MLP),
    "a function": ([F.gelu], [MLP[1], MLP[4]]),
    "torch's own spelling": ([torch._C._nn.gelu], [MLP[1], MLP[4]]),
    "a function for its method": (torch.softmax, [""]),
    "a method for its function": (torch.Tensor.add, ["", ""]),
    "an operator of Python": ([operator.add], ["", ""]),
    "an operator of ATen": ([torch.ops.aten.layer_norm], LAYER),
    "a predicate": ([lambda node: node.meta["val"].shape[-1] == 7], [MLP[0], MLP[1], MLP[3], MLP[4]]),
    "several": (("head", nn.LayerNorm), [*LAYER, "head"]),
    "a set": ({"extra"}, ["extra"]),
    "nothing": (None, []),
    "no items": ((), []),
}


@pytest.fixture(scope="module")
def graph():
    return run(trace(MODEL, [X]), passes.default())


@pytest.mark.parametrize("name", MEANT)
def test_meant(name, graph):
    items, modules = MEANT[name]
    found = [node for node in select("keep_fp32", items, graph, MODULES) if node.target is not operator.getitem]
    assert sorted({(n.meta["module"], n.name) for n in found}) == sorted((n.meta["module"], n.name) for n in found)
    assert sorted(n.meta["module"] for n in found if n.meta["val"].dim() == 2) == sorted(modules)


WRONG = {
    r"'layer.1' means no call of the module. Did you mean 'layers.1' or": "layer.1",
    r"'hed' means no call of the module. Did you mean 'head'\?": ["hed"],
    r"'blocks.*' means no call of the module. The modules that make calls are 'extra', 'head', 'layers', ": "blocks.*",
    r"'layers.0.mlp.unused' means no call of the module. There is such a module, but": "layers.0.mlp.unused",
    r"'layers.\*.drop' means no call of the module. There is such a module, but it is not called": "layers.*.drop",
    r"Identity means no call of the module. There are such modules, but they are not called": nn.Identity,
    r"Conv2d means no call of the module. The classes of modules that make calls are 'Inner', 'LayerNorm', ": nn.Conv2d,
    r"the module Linear means no call of the module": nn.Linear(6, 4),
    r"torch.relu means no call of the module. The functions that make calls are ": torch.relu,
    r"<lambda> means no call of the module": lambda node: False,
    r"<lambda> is no torch function .* and as a function of a torch.fx.Node it raises Attr": lambda n: n.none,
    r"3 is no module, its path or a pattern, class of modules, torch function or function of a node": [3],
    r"\['head'\] is no module, its path or a pattern": [["head"]],
    r"<class 'torch.Tensor'> is no module, its path or a pattern": [torch.Tensor],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong(message, graph):
    with pytest.raises(InputError, match=f"(?s)^force_low: (test_selection.)?{message}"):
        select("force_low", WRONG[message], graph, MODULES)


def test_several_engines():
    """What is called for a part of the sizes alone is meant, and what no engine calls is not; generators are kept."""
    for items in (["extra"], (item for item in ["extra", F.gelu]), MODEL.extra):
        model_trt = torch2rt(MODEL, [X], max_batch_size=8, precision="fp16", keep_fp32=items, verify=False)
        dtypes = {}
        for network in model_trt._networks:
            for node in network.lowered.graph.nodes:
                if node.op == "call_function" and node.meta.get("module") in ("extra", "head", "layers.0.mlp"):
                    dtypes.setdefault(node.meta["module"], set()).add(node.meta["val"].dtype)
        assert len(model_trt._networks) == 2
        assert dtypes["extra"] == {torch.float32} and torch.float16 in dtypes["head"]
    with pytest.raises(InputError, match=r"keep_fp32: 'extras' means no call of any engine. Did you mean 'extra'\?"):
        torch2rt(MODEL, [X], max_batch_size=8, precision="fp16", keep_fp32=["extras"])
