"""Refit: a converted module takes the values that its module's parameters have now, or says that it cannot."""

import copy
import dataclasses
import gc
import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from harness.fake_gpu import FakeGpu, rows
from torch import nn

from torch2rt import InputError, RefitError, TRTModule, torch2rt
from torch2rt.backend import quirks
from torch2rt.engine import build as build_file
from torch2rt.runtime import cuda_graph
from torch2rt.runtime import refit as refit_file

X = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """A batch norm that is folded, a weight that two layers share, and a number that Python reads."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Linear(3, 4, bias=False), nn.BatchNorm1d(4)
        self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4)
        self.third.weight = self.second.weight
        self.register_buffer("power", torch.tensor(2.0))
        self.factor = 0.5
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.tensor([0.1, -0.2, 0.3, 0.0]))

    def forward(self, x):
        x = self.third(torch.relu(self.second(self.norm(self.first(x)))))
        return x.abs() ** self.power.item() * self.factor


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, which is merged into the weight or computed beside it."""

    def __init__(self):
        super().__init__()
        self.base, self.is_merged = nn.Linear(3, 5), False
        self.a, self.b = nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(5, 2))

    def forward(self, x):
        return self.base(x) if self.is_merged else self.base(x) + F.linear(F.linear(x, self.a), self.b)

    @torch.no_grad()
    def merge(self, is_merged=True):
        self.base.weight.data += self.b @ self.a if is_merged else -self.b @ self.a
        self.is_merged = is_merged


class ByParity(nn.Module):
    """Two paths, for which it takes two engines."""

    def __init__(self):
        super().__init__()
        self.even, self.odd = nn.Linear(3, 4), nn.Linear(3, 4)

    def forward(self, x):
        return self.even(x) if x.shape[0] % 2 == 0 else self.odd(x) * 2


def converted(module, x=X, **options):
    options.setdefault("refittable", True)
    return torch2rt(module.eval(), [x], max_batch_size=6, verify=False, **options)


def error(model_trt, module, x=X):
    with torch.no_grad():
        return (model_trt.reference()(x) - module(x)).abs().max().item()


def change(module, names=None):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and (names is None or name in names):
                factor = torch.rand(value.shape, generator=generator) + 0.5
                value.copy_(value * factor.to(value.device) + 0.01)


# What it takes -------------------------------------------------------------------------------------------------------


def test_the_modules_own_values_by_default():
    module = Net()
    model_trt = converted(module)
    reference, others = model_trt.reference(), ["norm.running_var", "second.weight", "third.bias"]
    change(module, others)
    assert (reference(X) - module(X)).abs().max() > 1e-3, "the network's weights are its own"
    assert sorted(model_trt.changed()) == sorted([*others, "third.weight"])
    assert sorted(model_trt.refit()) == sorted([*others, "third.weight"])
    assert error(model_trt, module) < 1e-6 and (reference(X) - module(X)).abs().max() < 1e-6
    assert model_trt.changed() == model_trt.refit() == []


def test_only_what_changed_is_made_again(monkeypatch):
    module = Net()
    model_trt = converted(module)
    made = []
    monkeypatch.setattr(model_trt, "_take", lambda weights: made.append(weights) or False)
    change(module, ["third.bias"])
    model_trt.refit()
    assert [len(weights) for each in made for weights in [each[0]]] == [1]


def test_data_that_version_counters_miss():
    module = Net()
    model_trt = converted(module)
    module.first.weight.data[1, 2] += 1
    assert model_trt.changed() == ["first.weight"] == model_trt.refit()
    assert error(model_trt, module) < 1e-6


def test_another_module_and_a_state_dict():
    module, other = Net(), Net()
    model_trt = converted(module)
    assert model_trt.refit(other.eval()) and error(model_trt, other) < 1e-6
    change(other)
    other.power.fill_(2.0)
    model_trt.refit(other.state_dict())
    assert error(model_trt, other) < 1e-6
    model_trt.refit()
    assert error(model_trt, module) < 1e-6


def test_a_part_of_a_state_dict():
    module = Net()
    model_trt = converted(module)
    other = copy.deepcopy(module)
    change(other, ["first.weight"])
    assert model_trt.refit({"first.weight": other.first.weight}) == ["first.weight"]  # the batch norm is the module's
    assert error(model_trt, other) < 1e-6
    change(module, ["norm.running_var"])
    with pytest.raises(InputError, match=r"lacks norm\.running_var, of which weights are made together"):
        model_trt.refit({"first.weight": module.first.weight})
    assert error(model_trt, other) < 1e-6


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"fourth.weight": torch.ones(2)}, r"that the module does not have: fourth\.weight"),
        (Net().to("meta"), "dense tensors"),
        (nn.Linear(3, 4), r"has no first\.weight, "),
        (7, "a module or a state dict, not a int"),
        ({"model": {"first.weight": torch.ones(4, 3)}}, r"'model' is a dict\. A checkpoint may hold the state dict"),
        ({"first.weight": torch.ones(4, 3).numpy()}, r"'first\.weight' is a ndarray"),
        ({"first.weight": torch.ones(4, 3, device="meta")}, r"first\.weight is torch\.float32, torch\.strided, meta"),
        ({"first.weight": torch.ones(4, 3).to_sparse()}, r"torch\.sparse_coo, cpu"),
    ],
)
def test_a_source_of_another_kind(source, message):
    module = Net()
    model_trt = converted(module)
    with pytest.raises(InputError, match=message):
        model_trt.refit(source)
    assert model_trt.changed() == [] == model_trt.refit({"third._extra_state": {"of": "a module"}})


def test_several_engines():
    module = ByParity()
    model_trt = converted(module)
    assert len(model_trt.built.variants) == 2
    change(module)
    plans = model_trt.engine_bytes
    model_trt.refit()
    for rows_ in (3, 4):
        assert error(model_trt, module, X[:rows_]) < 1e-6
    assert model_trt.engine_bytes != plans and len(model_trt.built.variants) == 2


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precisions(precision):
    module = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    model_trt = converted(module, precision=precision)
    change(module)
    model_trt.refit()
    again = converted(module, precision=precision)
    assert torch.equal(model_trt.reference()(X), again.reference()(X))


def test_int8_scales_of_weights_are_made_again():
    module, data = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), [[X], [X * 2]]
    model_trt = converted(module, precision="int8", calibration=data, quantize_all=True)
    change(module, ["1.weight", "1.bias"])
    model_trt.refit()
    again = converted(module, precision="int8", calibration=data, quantize_all=True)
    assert torch.equal(model_trt.reference()(X), again.reference()(X))


def test_ranges_of_values_are_found_again_when_asked():
    """Weights 40 times as large saturate the ranges of before; the report says so until they are found again."""
    torch.manual_seed(2)
    module, data = nn.Sequential(nn.Linear(3, 16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 2)).eval(), [[X], [X * 2]]
    model_trt = converted(module, precision="int8", calibration=iter(data), quantize_all=True)
    with torch.no_grad():
        module[0].weight *= 40
        expected = module(X)
    error = lambda: ((model_trt.reference()(X) - expected).abs().max() / expected.abs().max()).item()  # noqa: E731
    module.train()  # the engine stays in the mode that it was converted in
    assert model_trt.refit() == ["0.weight"]
    assert error() > 0.5 and str(model_trt.report).count("have the ranges of before the refit") == 1
    assert model_trt.refit(calibration=data) == []
    assert error() < 0.05 and "ranges of before" not in str(model_trt.report)
    before = model_trt.engine_bytes
    state = {"0.weight": module[0].weight.detach() / 40}
    assert model_trt.refit(state, calibration=[X]) == ["0.weight"]
    assert model_trt.engine_bytes != before
    module.eval()
    with torch.no_grad():
        module[0].weight /= 40
        expected = module(X)
    assert error() < 0.05 and model_trt.changed() == []
    with pytest.raises(InputError, match=r"calibration"):
        model_trt.refit(calibration=[])


def test_ranges_are_found_for_quantised_values_only():
    model_trt = converted(Net())
    with pytest.raises(InputError, match=r"refit\(calibration=...\) is for modules whose values are quantised"):
        model_trt.refit(calibration=[[X]])


@pytest.mark.parametrize("precision", ["int8_weights", "int4_weights"])
def test_weights_in_few_bits_are_made_again(precision):
    module, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.ones(2, 32)
    model_trt = converted(module, x, precision=precision)
    before = model_trt.reference()(x)
    change(module)
    assert len(model_trt.refit()) == 4
    again = converted(module, x, precision=precision).reference()(x)
    assert torch.equal(model_trt.reference()(x), again) and (again - before).abs().max() > 0.1


@pytest.mark.parametrize(("precision", "names"), [("int8_weights", True), ("int4_weights", False), ("fp8", False)])
def test_weights_that_have_no_type_of_torchs_have_no_names(precision, names):
    module, x = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)), torch.ones(2, 32)
    calibration = {"calibration": [[x]], "quantize_all": True} if precision == "fp8" else {}
    model_trt = converted(module, x, precision=precision, **calibration)
    assert build_file._name_weights(model_trt.networks()[0]) is names  # else the engine is built again


# What it cannot have -------------------------------------------------------------------------------------------------


def test_a_value_that_python_has_read():
    module = Net()
    model_trt = converted(module)
    before = model_trt.reference()(X)
    change(module, ["power", "second.bias"])
    with pytest.raises(RefitError, match=r"power: Python has read its value .*it was 2\.0, and is ") as raised:
        model_trt.refit()
    assert raised.value.names == ["power"] and torch.equal(model_trt.reference()(X), before)
    module.train()  # the engine stays in the mode that it was converted in
    assert sorted(model_trt.refit(strict=False)) == ["power", "second.bias"]
    assert module.training and module.norm.training
    module.eval()
    assert error(model_trt, module) < 1e-6


def test_an_attribute_that_is_no_tensor():
    module = Net()
    model_trt = converted(module)
    module.factor = 3
    assert model_trt.changed() == ["factor"]
    with pytest.raises(RefitError, match="factor: what is no weight, such as attributes"):
        model_trt.refit()
    model_trt.refit(strict=False)
    assert error(model_trt, module) < 1e-6 and model_trt.changed() == []


def test_an_attribute_that_changes_nothing():
    module = Net()
    model_trt = converted(module)
    plan = model_trt.built
    module.note = "a name"
    change(module, ["first.weight"])
    assert model_trt.refit() == ["first.weight"]
    assert error(model_trt, module) < 1e-6 and model_trt.report is plan.report


def test_shapes_and_types_that_are_others():
    module = Net()
    model_trt = converted(module)
    wider = {**module.state_dict(), "first.weight": torch.randn(4, 4)}
    with pytest.raises(RefitError, match=r"first\.weight: it was torch\.float32 \(4, 3\), and is .*\(4, 4\)"):
        model_trt.refit(wider)
    assert model_trt.changed() == []


def test_a_tensor_outside_of_the_module():
    table = torch.randn(3)

    class Outside(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(3))

        def forward(self, x):
            return x * self.scale + table

    module = Outside()
    model_trt = converted(module)
    table += 1
    change(module)
    model_trt.refit(strict=False)
    assert error(model_trt, module) < 1e-6


def test_an_adapter_that_is_merged_and_beside():
    module = Adapted()
    model_trt = converted(module)
    change(module, ["a"])
    assert model_trt.refit() == ["a"] and error(model_trt, module) < 1e-6
    module.merge()
    with pytest.raises(RefitError, match="is_merged"):  # the engine would add the adapter a second time
        model_trt.refit()
    module.merge(False)
    model_trt.refit()
    assert error(model_trt, module) < 1e-6
    module.merge()
    merged = converted(module)
    weight = module.base.weight.detach().clone()
    change(module, ["b", "base.weight"])
    assert merged.refit() == ["base.weight"] and error(merged, module) < 1e-6
    with torch.no_grad():
        module.base.weight.copy_(weight)
    merged.refit()
    assert torch.equal(merged.reference()(X), module(X))


def test_the_module_is_gone():
    module = Net()
    model_trt, values = converted(module), Net().eval()
    del module
    gc.collect()
    with pytest.raises(InputError, match="The module that was converted is gone"):
        model_trt.refit()
    model_trt.refit(values)
    assert error(model_trt, values) < 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(fallback=True), "do not go with fallback=True"),
        (dict(keep_network=False), "do not go with keep_network=False"),
        (dict(precision="auto"), "do not go with precision='auto'"),
    ],
)
@pytest.mark.parametrize("how", ["refittable", "follow"])
def test_options_that_do_not_go_together(options, message, how):
    with pytest.raises(InputError, match=message):
        torch2rt(nn.Linear(3, 4), [X], **{how: True}, **options)


def test_without_being_refittable():
    model_trt = torch2rt(nn.Linear(3, 4), [X], verify=False)
    for action in (model_trt.refit, model_trt.changed, model_trt.follow):
        with pytest.raises(InputError, match="convert with refittable=True"):
            action()


def test_modules_that_are_not_followed_into():
    scripted = torch.jit.script(nn.Linear(3, 4))
    with pytest.raises(InputError, match="TorchScript"):
        torch2rt(scripted, [X], refittable=True)
    sparse = nn.Linear(3, 4)
    sparse.register_buffer("table", torch.eye(3).to_sparse())
    with pytest.raises(InputError, match="table is sparse"):
        torch2rt(sparse, [X], refittable=True)


# What is saved, copied and run meanwhile -----------------------------------------------------------------------------


def test_what_is_saved_has_the_new_weights(tmp_path):
    module = Net()
    model_trt = converted(module)
    change(module, ["third.bias"])
    bias = module.third.bias.detach().numpy().tobytes()  # which stands in the plan as it is
    assert bias not in model_trt.engine_bytes
    model_trt.refit()
    assert bias in model_trt.engine_bytes
    model_trt.save_engine(tmp_path / "net.engine")
    loaded = TRTModule()
    loaded.load_state_dict(model_trt.state_dict())
    for copied in (TRTModule.from_engine(tmp_path / "net.engine"), loaded, copy.deepcopy(model_trt)):
        assert copied.engine_bytes == model_trt.engine_bytes
        with pytest.raises(InputError, match="refittable"):
            copied.refit()


def test_the_report_says_that_the_weights_are_others():
    module = Net()
    model_trt = torch2rt(module.eval(), [X], refittable=True)
    change(module, ["third.bias"])
    model_trt.refit()
    assert str(model_trt.report).count("refitted with since it was verified") == 1


def test_references_are_old_or_new_but_nothing_between():
    module = nn.Sequential(*[nn.Linear(3, 3, bias=False) for _ in range(6)]).eval()
    model_trt, results, stop = converted(module), set(), threading.Event()
    reference = model_trt.reference()
    expected = set()

    def evaluate():
        while not stop.is_set():
            results.add(tuple(reference(X).flatten().tolist()))

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    expected.add(tuple(reference(X).flatten().tolist()))
    for thread in threads:
        thread.start()
    for _ in range(20):
        change(module)
        model_trt.refit()
        expected.add(tuple(reference(X).flatten().tolist()))
    stop.set()
    for thread in threads:
        thread.join()
    assert results <= expected


# Engines -------------------------------------------------------------------------------------------------------------


def test_weights_have_names_of_their_own():
    module = Net()
    model_trt = converted(module)
    (network,) = model_trt._live.networks
    assert build_file._name_weights(network)
    names = network.weight_names()
    assert set(names) == {weight.number for weight in network.weights.values()}


def test_a_build_that_cannot_be_refitted_is_another_one(monkeypatch, caplog):
    monkeypatch.setattr(build_file, "builds_refittable", lambda: True)  # TensorRT for RTX needs a GPU for it
    model_trt = converted(Net())
    expected = "refittable" in model_trt.made_by
    assert expected == quirks.builds_refittable() and model_trt.engine_bytes
    assert ("cannot change the weights" in caplog.text) is not expected


class Refitter:
    """In the place of TensorRT's: it doubles nothing, and keeps what it is told."""

    made: list = []
    refuses = ""

    def __init__(self, engine, log):
        self.named, self.set, self.made_for, self.weights_validation = {}, set(), engine, True
        Refitter.made.append(self)

    def get_all_weights(self):
        return ["a", "b"]

    def set_named_weights(self, name, weights, location):
        self.named[name] = (weights.size, location)
        self.set.add(name)
        return name != self.refuses

    def get_missing_weights(self):
        return ["b"] if self.refuses == "missing" and "b" not in self.set else []

    def unset_named_weights(self, name):
        self.set.discard(name)

    def refit_cuda_engine_async(self, stream):
        self.stream, self.given = stream, set(self.set)
        return self.refuses != "refit"


@pytest.fixture
def fake(monkeypatch):
    gpu = FakeGpu(monkeypatch, [rows()])
    gpu.pool.device = torch.device("cpu")
    gpu.pool.external = SimpleNamespace(synchronize=lambda: None)
    monkeypatch.setattr(refit_file, "on_device", lambda index: torch.no_grad())
    stream = SimpleNamespace(synchronize=lambda: None, wait_stream=lambda other: None, cuda_stream=7)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: stream)
    monkeypatch.setattr(
        cuda_graph, "empty", lambda shape, stride, dtype: torch.empty_strided(shape, stride, dtype=dtype)
    )
    monkeypatch.setattr(refit_file.trt, "Refitter", Refitter)
    Refitter.made, Refitter.refuses = [], ""
    return gpu


def test_an_engine_gets_weights_while_nobody_runs_it(fake):
    holder = object()
    fake.loaded.lock.acquire(holder)
    done = []
    thread = threading.Thread(target=lambda: done.append(refit_file.refit_engine(fake.pool, {"a": torch.ones(3)})))
    thread.start()
    thread.join(0.2)
    assert thread.is_alive() and not Refitter.made, "a run is under way"
    fake.loaded.lock.release(holder)
    thread.join(10)
    assert done == [True]
    (refitter,) = Refitter.made
    assert refitter.named == {"a": (3, refit_file.trt.TensorLocation.DEVICE)} and refitter.stream == fake.pool.stream
    assert refit_file.refit_engine(fake.pool, {"b": torch.ones(2)}) and Refitter.made == [refitter]
    assert refitter.given == {"b"} and not refitter.set, "a is not read again, which is gone"


@pytest.mark.parametrize(("refuses", "name"), [("a", "a"), ("missing", "a"), ("refit", "a"), ("", "unknown")])
def test_an_engine_that_refuses(fake, refuses, name):
    Refitter.refuses = refuses
    assert refit_file.refit_engine(fake.pool, {name: torch.ones(3)}) is False


def test_weights_that_are_merged_with_others(fake):
    Refitter.refuses = "missing"
    others = {"a": torch.zeros(3), "b": torch.ones(2), "c": torch.ones(1)}
    assert refit_file.refit_engine(fake.pool, {"a": torch.ones(3)}, lambda: others)
    (refitter,) = Refitter.made
    assert refitter.given == {"a", "b"} and not refitter.set and not refitter.weights_validation
    assert refitter.named["b"][0] == 2 and refitter.max_threads >= 1


@pytest.mark.parametrize("refuses", ["", "refit"])
def test_what_the_first_refit_compiles_is_done_before_traffic(fake, monkeypatch, refuses):
    if torch.cuda.is_available():
        pytest.skip("plays a GPU while an engine is built")
    model_trt, Refitter.refuses = converted(Net()), refuses
    (network,) = model_trt._live.networks
    names = {number: f"w{number}" for number in network.weight_names()}
    monkeypatch.setattr(network, "weight_names", lambda: names)
    monkeypatch.setattr(Refitter, "get_all_weights", lambda self: [*names.values()])
    model_trt._warm_up_refits()
    assert not Refitter.made, "this engine cannot be refitted"
    model_trt.built = dataclasses.replace(model_trt.plan, made_by={**model_trt.made_by, "refittable": "yes"})
    model_trt._pools, model_trt._index = {fake.pool.index: fake.pool}, fake.pool.index
    model_trt._warm_up_refits()
    (refitter,) = Refitter.made
    assert refitter.given == set(names.values()) and len(names) > 2
    assert model_trt.is_stale is bool(refuses) and bool(model_trt._pools) is not bool(refuses)
    if not refuses:
        model_trt._warm_up_refits()
        assert Refitter.made == [refitter] and refitter.given, "it is done once"


def test_graphs_are_captured_again(fake):
    x = torch.randn(4, 5)
    for _ in range(4):
        fake.call(x, graph=True)
    captured = fake.captured
    assert captured and fake.pool.graphs
    assert refit_file.refit_engine(fake.pool, {"a": torch.ones(3)})
    assert not fake.pool.graphs
    for _ in range(4):
        fake.call(x, graph=True)
    assert fake.captured > captured


def test_weights_are_changed_in_place(device):
    if device.type != "cuda" or not quirks.builds_refittable():
        pytest.skip("needs a GPU, and a TensorRT that refits")
    module, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8 * 36, 5)), None
    module, x = module.eval().to(device), torch.randn(2, 3, 8, 8, device=device)
    model_trt = torch2rt(module, [x], refittable=True)
    model_trt(x)
    pool = model_trt._ready()
    for _ in range(3):
        change(module)
        model_trt.refit()
        assert model_trt._ready() is pool, "it was built again"
        assert (model_trt(x) - module(x)).abs().max() < 5e-3  # in TensorFloat32, where the environment asks for it
    model_trt.cuda_graph = True
    for _ in range(5):
        model_trt(x)
    change(module)
    model_trt.refit()
    assert (model_trt(x) - module(x)).abs().max() < 1e-3
    loaded = TRTModule()
    loaded.load_state_dict(model_trt.state_dict())
    assert (loaded(x) - module(x)).abs().max() < 1e-3
