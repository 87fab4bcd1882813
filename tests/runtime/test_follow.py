"""A converted module that follows its module agrees with it at each call, whatever has changed it."""

import copy
import gc

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.optim import optimizer as optimizers

from torch2rt import EngineError, InputError, RefitError, torch2rt
from torch2rt.runtime.follow import _watched

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


def network():
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)).eval()


@pytest.fixture(scope="module")
def followed():
    module = network()
    return module, torch2rt(module, [X], max_batch_size=6, verify=False, follow=True)


def step(kind, **options):
    def act(module):
        optimizer = kind(module.parameters(), lr=0.1, **options)
        module(X).square().sum().backward()
        optimizer.step()

    return act


@torch.no_grad()
def in_place(module):
    module[2].bias += 0.5


def load(module):
    module.load_state_dict({name: value * 1.5 for name, value in module.state_dict().items()})


def assign(module):
    values = {name: value.clone() * 1.5 for name, value in module.state_dict().items()}
    module.load_state_dict(values, assign=True)


def replaced(module):
    module[0].weight = nn.Parameter(torch.randn(5, 3))


def replaced_buffer(module):
    module[1].running_mean = torch.randn(5)


def replaced_module(module):
    module[2] = nn.Linear(5, 2)


def new_memory(module):
    module[0].bias.data = torch.randn(5)


def trained(module):
    module.train()
    module(X)
    module.eval()


def inserted(module):
    layer = nn.Linear(5, 2)
    layer.bias.data += 1
    del module[2]
    module.insert(2, layer)


ACTIONS = {
    "SGD": step(torch.optim.SGD),
    "fused SGD": step(torch.optim.SGD, fused=True),
    "fused Adam": step(torch.optim.Adam, fused=True),
    "fused AdamW": step(torch.optim.AdamW, fused=True),
    "foreach": step(torch.optim.Adam, foreach=True),
    "in place": in_place,
    "load_state_dict": load,
    "assign": assign,
    "replaced": replaced,
    "replaced buffer": replaced_buffer,
    "replaced module": replaced_module,
    "inserted": inserted,
    "new memory": new_memory,
    "statistics": trained,
}


@pytest.mark.parametrize("name", ACTIONS)
def test_whatever_changes_it(name, followed):
    module, model_trt = followed
    reference = model_trt.reference()
    with torch.no_grad():
        before = module(X)
        assert (reference(X) - before).abs().max() < 1e-6
    ACTIONS[name](module)
    with torch.no_grad():
        after = module(X)
    assert (after - before).abs().max() > 1e-3
    assert (reference(X) - after).abs().max() < 1e-4 * after.abs().max()
    assert model_trt.changed() == []


@pytest.mark.parametrize("how", ["plain", "inference", "hooks", "same", "transform"])
def test_counters_are_compared_wherever_one_looks(how):
    """Also where autograd keeps something else than the tensors, so that it would not notice."""
    tensors = [nn.Parameter(torch.ones(2)), torch.ones(3), torch.ones(2, dtype=torch.int64)]
    found = []

    def look(x=0):
        found.append(_watched(tensors))
        return x

    hooks = {"hooks": torch.clone, "same": lambda x: x}
    if how == "plain":
        look()
    elif how == "inference":
        with torch.inference_mode():
            look()
    elif how == "transform":
        torch.func.grad(look)(torch.ones(()))
    else:
        with torch.autograd.graph.saved_tensors_hooks(hooks[how], lambda x: x):
            look()
    (is_written,) = found
    assert is_written.func.__name__ == ("_is_refused" if how in ("plain", "inference") else "_differ")
    assert not is_written() and not is_written()
    for tensor in tensors[1:] if how != "plain" else tensors[:1]:
        with torch.no_grad():
            tensor.add_(1)
        assert is_written()


OUTSIDE = torch.randn(3)


class Tables(nn.Module):
    """Tensors that are no parameters or buffers: attributes, in a list, in a tuple of a dict, and not the module's."""

    def __init__(self):
        super().__init__()
        self.linear, self.table = nn.Linear(3, 3), torch.randn(3)
        self.tables, self.named = [torch.randn(3), torch.randn(3)], {"a": (torch.randn(3),)}

    def forward(self, x):
        return self.linear(x) * (self.table * 2) + self.tables[1] - self.named["a"][0] * 3 + OUTSIDE * 0.5


def another_table(module):
    module.table = torch.randn(3)


def another_list(module):
    module.tables = [torch.randn(3), torch.randn(3)]


OF_TABLES = {
    "attribute": another_table,
    "attribute in place": lambda module: module.table.add_(1),
    "in a list": lambda module: module.tables.__setitem__(1, torch.randn(3)),
    "in a list in place": lambda module: module.tables[1].add_(1),
    "list": another_list,
    "in a tuple of a dict": lambda module: module.named.update(a=(torch.randn(3),)),
    "outside": lambda module: OUTSIDE.add_(1),
}


@pytest.fixture(scope="module")
def with_tables():
    module = Tables().eval()
    return module, torch2rt(module, [X], verify=False, follow=True).reference()


@pytest.mark.parametrize("name", OF_TABLES)
def test_tensors_that_are_no_parameters(name, with_tables):
    module, reference = with_tables
    before = reference(X)
    OF_TABLES[name](module)
    with torch.no_grad():
        assert (reference(X) - module(X)).abs().max() < 1e-5 < 1e-3 < (reference(X) - before).abs().max()


def test_layers_are_dropped_and_added():
    module = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.ModuleList([nn.Linear(3, 3)])[0]).eval()
    reference = torch2rt(module, [X], verify=False, follow=True).reference()
    changes = (lambda m: m.pop(1), lambda m: m.insert(0, nn.Tanh()), lambda m: m.append(nn.Linear(3, 2)))
    for change in changes:
        before = module(X)
        change(module)
        after = module(X)
        assert after.shape != before.shape or (after - before).abs().max() > 1e-3
        assert (reference(X) - after).abs().max() < 1e-5


def test_memory_at_the_same_address_is_noticed():
    """Memory that is given back may come again at once: here the third has the address of the first."""
    module = nn.Linear(3, 171, bias=False)
    reference = torch2rt(module, [X], verify=False, follow=True).reference()
    for _ in range(20):
        for factor in (1.3, 1.1):
            module.weight.data = module.weight.data * factor
        assert (reference(X) - module(X)).abs().max() < 1e-4 * module(X).abs().max()


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.one(x) + 2 * self.other(x.flip(-1))


def test_tied_weights_and_those_that_are_tied_no_more():
    module, other = Tied(), Tied()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    reference = model_trt.reference()
    assert model_trt.refit({"one.weight": other.one.weight}) == ["one.weight", "other.weight"]
    assert (reference(X) - other(X)).abs().max() < 1e-5
    with torch.no_grad():
        module.other.weight *= 2
    assert (reference(X) - module(X)).abs().max() < 1e-5
    module.other.weight = nn.Parameter(torch.randn(5, 3))
    assert (reference(X) - module(X)).abs().max() < 1e-5 and model_trt.changed() == []
    with pytest.raises(RefitError, match=r"one\.weight, other\.weight|other\.weight, one\.weight"):
        torch2rt(other, [X], verify=False, refittable=True).refit(module)


def test_the_parameters_of_other_networks_are_followed():
    """`prune` puts a parameter, a mask and a hook in the place of a weight, and `remove` a weight of another kind."""
    module = network()
    reference = torch2rt(module, [X], max_batch_size=6, verify=False, follow=True).reference()
    for change in (lambda: prune.l1_unstructured(module[2], "weight", 0.4), lambda: prune.remove(module[2], "weight")):
        change()
        reference(X)
        for name, parameter in reversed(list(module.named_parameters())):  # the new one first
            with torch.no_grad():
                parameter.add_(torch.rand_like(parameter))
                expected = module(X)
            assert (reference(X) - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_a_parametrization_is_followed():
    module = network()
    model_trt = torch2rt(module, [X], verify=False, follow=True)

    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    nn.utils.parametrize.register_parametrization(module[0], "weight", Twice())
    with torch.no_grad():
        assert (model_trt.reference()(X) - module(X)).abs().max() < 1e-5
    assert model_trt.changed() == []


def test_what_only_comparing_sees():
    module = Tables().eval()
    model_trt = torch2rt(module, [X], verify=False, refittable=True)
    assert model_trt.changed() == []
    handle = module.linear.register_forward_hook(lambda module, args, output: output * 2)
    assert model_trt.changed() == ["linear._forward_hooks"]
    handle.remove()
    OUTSIDE.add_(1)
    assert model_trt.changed() == ["a tensor that the module's forward uses, and does not own"]


UNSEEN = {
    "data": (lambda m: m[0].weight.data.add_(1), ["0.weight"]),
    "numpy": (lambda m: m[0].weight.detach().numpy().__imul__(2), ["0.weight"]),
    "storage": (lambda m: m[0].bias.untyped_storage().copy_(torch.ones(5).untyped_storage()), ["0.bias"]),
    "removed": (lambda m: setattr(m[0], "bias", None), ["0.bias"]),
    "parameters": (lambda m: m[0]._parameters.update(bias=nn.Parameter(torch.ones(5))), ["0.bias"]),
    "buffers": (lambda m: m[1]._buffers.update(running_mean=torch.ones(5)), ["1.running_mean"]),
    "modules": (lambda m: m._modules.update({"2": nn.Linear(5, 2)}), ["2.weight", "2.bias"]),
    "number": (lambda m: setattr(m[1], "eps", 0.5), ["1.eps"]),
    "hook": (lambda m: m[2].register_forward_pre_hook(lambda m, args: (args[0] * 2,)), ["2._forward_pre_hooks"]),
    "forward": (lambda m: setattr(m[2], "forward", lambda x: x[:, :2] * 3), ["2.forward"]),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_follow_does_not_see_is_named(name):
    module = network()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    change, names = UNSEEN[name]
    change(module)
    assert set(model_trt.changed()) == set(names)
    model_trt.refit(strict=False)
    with torch.no_grad():
        assert (model_trt.reference()(X) - module(X)).abs().max() < 1e-5
    assert model_trt.changed() == []


def test_what_is_saved_has_the_weights_of_now():
    module = nn.Linear(3, 5)
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    ways = {
        "engine_bytes": lambda: model_trt.engine_bytes,
        "state dict": lambda: model_trt.state_dict()["engine"].numpy().tobytes(),
        "copy": lambda: copy.deepcopy(model_trt).engine_bytes,
    }
    for place, way in enumerate(ways.values()):
        with torch.no_grad():
            module.bias[1] = 113.0 + place
        assert module.bias.detach().numpy().tobytes() in way()


def test_a_checkpoint_of_both_is_loaded():
    """As where training goes on from it: the engine follows the module, which has the checkpoint's weights then."""

    def made():
        module = network()
        return nn.ModuleDict({"module": module, "engine": torch2rt(module, [X], verify=False, follow=True)})

    saved, both = made().state_dict(), made()
    assert both.load_state_dict(saved).missing_keys == []
    module, reference = both["module"], both["engine"].reference()
    for change in (lambda module: None, in_place):
        change(module)
        assert (reference(X) - module(X)).abs().max() < 1e-5 and both["engine"].follows
    with pytest.raises(EngineError, match="digest"):
        both.load_state_dict({**saved, "engine.engine": saved["engine.engine"].flip(0)})
    engine = both["engine"]
    del module, both, reference
    gc.collect()
    engine.load_state_dict({"engine": saved["engine.engine"], "header": saved["engine.header"]})
    assert not engine.follows and engine.engine_bytes == saved["engine.engine"].numpy().tobytes()


def test_tensors_are_swapped_after_a_conversion():
    """As `.to()` does with parameters of tensor subclasses: torch refuses where somebody has a weak reference."""
    linear = nn.Linear(3, 5)
    model_trt = torch2rt(linear, [X], verify=False, refittable=True)
    torch.utils.swap_tensors(linear.weight, nn.Parameter(torch.randn(5, 3)))
    assert model_trt.refit() == ["weight"]
    with torch.no_grad():
        torch.testing.assert_close(model_trt.reference()(X), linear(X))


def test_writes_that_are_not_counted_are_refused():
    module = network()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    with torch.inference_mode():
        uncounted = nn.Parameter(torch.randn(2), requires_grad=False)
    module[2].bias = uncounted
    with pytest.raises(InputError, match=r"follow cannot notice writes to 2\.bias"):
        model_trt.reference()(X)
    with torch.inference_mode():
        made = network()
    with pytest.raises(InputError, match="made in inference mode"):
        torch2rt(made, [X], refittable=True)


def test_replicas_of_data_parallel_have_what_the_module_has(followed):
    module, model_trt = followed
    in_place(module)
    replica = model_trt._replicate_for_data_parallel()
    assert model_trt.changed() == [] and replica._follow is None


def test_nothing_is_compared_when_nothing_changed(followed, monkeypatch):
    _, model_trt = followed
    reference = model_trt.reference()
    reference(X)
    monkeypatch.setattr(model_trt, "refit", lambda **options: pytest.fail("it was refitted"))
    optimizer = torch.optim.SGD(nn.Linear(3, 3).parameters(), lr=0.1)
    optimizer.step()  # of another module
    nn.Linear(3, 3).weight = nn.Parameter(torch.randn(3, 3))
    reference(X)


def test_what_nothing_sees_is_found_by_comparing(followed):
    module, model_trt = followed
    module[2].weight.data.mul_(2)
    assert model_trt.changed() == ["2.weight"]
    assert model_trt.refit() == ["2.weight"] and model_trt.changed() == []


def test_what_cannot_be_refitted_is_built_again():
    class Powered(nn.Module):
        def __init__(self):
            super().__init__()
            self.power = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x.abs() ** self.power.item()

    module = Powered()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    with torch.no_grad():
        module.power.fill_(3.0)
    assert torch.allclose(model_trt.reference()(X), X.abs() ** 3)


def test_hooks_go_with_the_converted_module():
    hooks = optimizers._global_optimizer_post_hooks
    before, module = len(hooks), network()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    assert len(hooks) == before + 1
    copied = copy.deepcopy(model_trt)
    del model_trt
    gc.collect()
    assert len(hooks) == before and copied._follow is None


def test_the_module_may_go():
    module = network()
    model_trt = torch2rt(module, [X], verify=False, follow=True)
    reference = model_trt.reference()
    expected = reference(X)
    del module
    gc.collect()
    assert torch.equal(reference(X), expected)
