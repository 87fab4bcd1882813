"""TRTModule is an `nn.Module` with the converted module's calling convention, on any machine and through any file."""

import collections
import copy
import dataclasses
import io
import json
import os
import pickle

import pytest
import torch
from harness import compare
from test_tracing import module

from torch2rt import InputError, TRTModule, torch2rt, trace
from torch2rt.backend import quirks
from torch2rt.interface import Interface


@dataclasses.dataclass
class Result:
    hidden: torch.Tensor
    pooled: torch.Tensor | None = None
    count: int = 0


Pair = collections.namedtuple("Pair", ["left", "right"])


def runner(model_trt, device):
    return model_trt if device.type == "cuda" else model_trt.reference()


def nested(self, batch, mask=None, *, mode="sum", options=None):
    ids, extra = batch["ids"], batch["extra"][1]
    total = ids.float() + extra
    if mask is not None:
        total = total * mask
    if mode == "sum":
        total = total + options[0]
    return {"total": total, "pair": Pair(total * 2, [ids, None]), "n": 3, "result": Result(total, count=total.shape[0])}


@pytest.fixture(scope="module")
def batch(device):
    return {"ids": torch.randint(0, 9, (2, 5), device=device), "extra": ("ignored", torch.randn(2, 5, device=device))}


def test_nested_inputs_and_results_keep_their_structure(batch, device):
    made = module(nested)
    options = [torch.randn(5, device=device), 4.0]
    mask = torch.rand(2, 5, device=device) > 0.5
    model_trt = torch2rt(
        made,
        [batch, mask],
        kwargs={"options": options},
        min_shapes=[(1, 5), (1, 5), (1, 5), (5,)],
        max_shapes=[(4, 5), (4, 5), (4, 5), (5,)],
    )
    assert [i.dtype for i in model_trt.interface.inputs] == [torch.int64, torch.float32, torch.bool, torch.float32]
    grown = {"ids": batch["ids"].repeat(2, 1)[:3], "extra": ("ignored", torch.randn(3, 5, device=device))}
    mask = torch.rand(3, 5, device=device) > 0.5
    actual, expected = runner(model_trt, device)(grown, mask, options=options), made(grown, mask, options=options)
    assert type(actual["pair"]) is Pair and type(actual["result"]) is Result
    assert (actual["n"], actual["result"].count, actual["result"].pooled) == (3, 3, None)
    compare(actual["result"].hidden, expected["result"].hidden)
    compare(actual["total"], expected["total"])
    compare(tuple(actual["pair"]), tuple(expected["pair"]))


def with_constants(self, x, scale, *, shift=0.5, mode="mul", mask=None, flag=False):
    return x * scale + shift if mask is None else (x * scale + shift) * mask


X, MASK = torch.randn(2, 3), torch.rand(2, 3)
CALLS = [  # of with_constants(X, 2, shift=-0.0, mode="mul", mask=MASK, flag=True)
    ((X, 2), {}, None),
    ((X,), {"scale": 2}, None),
    ((), {"scale": 2, "x": X}, None),
    ((X, 2), {"mask": MASK, "flag": True, "mode": "".join("mul"), "shift": float("-0")}, None),
    ((X, 2, 3), {}, "2 positional arguments and got 3"),
    ((X, 2.0), {}, r"arguments\[0\]\[1\] was 2 and is 2.0"),
    ((X, 3), {}, r"was 2 and is 3"),
    ((X, None), {}, r"was 2 and is None"),
    ((X, X), {}, r"was 2 and is a tensor"),
    ((2, X), {}, r"arguments\[0\]\[0\] was a tensor and is 2"),
    ((X, 2), {"shift": 0.0}, r"arguments\[1\]\['shift'\] was -0.0 and is 0.0"),
    ((X, 2), {"mode": "add"}, r"was 'mul' and is 'add'"),
    ((X, 2), {"flag": 1}, r"was True and is 1"),
    ((X, 2), {"mask": None}, r"was a tensor and is None"),
    ((X, 2), {"mask": [MASK]}, r"was a tensor and is a list of 1"),
    ((X, 2), {"other": 1}, "keywords"),
]


@pytest.mark.parametrize("saved", [False, True], ids=["made", "saved"])
@pytest.mark.parametrize("quick", [False, True], ids=["looked at", "plain"])
@pytest.mark.parametrize(("args", "changes", "problem"), CALLS, ids=range(len(CALLS)))
def test_a_call_has_the_form_it_was_converted_with(monkeypatch, args, changes, problem, quick, saved):
    kwargs = {"shift": -0.0, "mode": "mul", "mask": MASK, "flag": True}
    interface = trace(module(with_constants), [X, 2], kwargs=kwargs).meta["torch2rt"].interface
    if saved:
        interface = Interface.from_json(json.loads(json.dumps(interface.to_json())))
    if not quick:
        monkeypatch.setattr("torch2rt.interface.take", lambda *_: False)
    if problem is None:
        found = interface.tensors(args, {**kwargs, **changes})
        assert found[0] is X and found[1] is MASK and len(found) == 2
    else:
        with pytest.raises(InputError, match=problem):
            interface.tensors(args, {**kwargs, **changes})


def test_constants_that_differ_only_in_kind_are_not_the_same(device):
    model_trt = torch2rt(module(lambda self, x, n: x * n), [torch.ones(2, 3, dtype=torch.int32, device=device), 2])
    x = torch.full((2, 3), 7, dtype=torch.int32, device=device)
    assert runner(model_trt, device)(x, 2).dtype == torch.int32
    with pytest.raises(InputError, match=r"was 2 and is 2\.0"):  # its result is float32
        runner(model_trt, device)(x, 2.0)


def test_dtypes_pass_through(device):
    made = module(lambda self, *xs: tuple(x + x if x.dtype != torch.bool else x & x for x in xs))
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.int32, torch.int64, torch.bool)
    inputs = [torch.ones(2, 3, device=device).to(d) for d in dtypes]
    results = runner(torch2rt(made, inputs), device)(*inputs)
    assert [r.dtype for r in results] == list(dtypes)
    compare(results, made(*inputs))


def test_one_tensor_may_be_an_output_twice_or_an_input(device):
    made = module(lambda self, x, y: (x, y * 2, x, (y * 2).clone()))
    x, y = torch.randn(2, device=device), torch.randn(3, device=device)
    compare(runner(torch2rt(made, [x, y]), device)(x, y), made(x, y))


def test_a_constant_may_be_an_output(device):
    made = module(lambda self, x: (x + 1, self.table * 2), table=torch.randn(3)).to(device)
    x = torch.randn(2, device=device)
    compare(runner(torch2rt(made, [x]), device)(x), made(x))


def test_names_are_the_users(device):
    x = torch.randn(2, 3, device=device)
    model_trt = torch2rt(
        module(lambda self, a, b: (a + b, a)), [x, x], input_names=["left", "right"], output_names=["sum", "a"]
    )
    assert (model_trt.input_names, model_trt.output_names) == (["left", "right"], ["sum", "a"])
    assert [model_trt.network.get_input(i).name for i in range(2)] == ["left", "right"]
    assert [model_trt.network.get_output(i).name for i in range(2)] == ["sum", "a"]


def test_layers_are_named_after_module_and_line():
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU())
    network = torch2rt(made.eval(), [torch.randn(2, 3)]).network
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    assert layers[0].name.startswith("0.linear") and layers[-1].name.startswith("1.relu")
    assert len({layer.name for layer in layers}) == len(layers)
    assert all(":" in layer.metadata for layer in layers)


# Copies --------------------------------------------------------------------------------------------------------------


def through_torch_save(model_trt, tmp_path):
    buffer = io.BytesIO()
    torch.save(model_trt.state_dict(), buffer)
    buffer.seek(0)
    loaded = TRTModule()
    loaded.load_state_dict(torch.load(buffer))
    return loaded


def through_safetensors(model_trt, tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(model_trt.state_dict(), tmp_path / "model.safetensors")
    loaded = TRTModule()
    loaded.load_state_dict(safetensors.load_file(tmp_path / "model.safetensors"))
    return loaded


def through_a_file(model_trt, tmp_path):
    model_trt.save_engine(tmp_path / "model.engine")
    return TRTModule.from_engine(tmp_path / "model.engine")


def through_bytes(model_trt, tmp_path):
    model_trt.save_engine(tmp_path / "model.engine")
    return TRTModule.from_engine((tmp_path / "model.engine").read_bytes())


def through_pickle(model_trt, tmp_path):
    return pickle.loads(pickle.dumps(model_trt))


def through_deepcopy(model_trt, tmp_path):
    return copy.deepcopy(model_trt)


def through_torch_save_of_the_module(model_trt, tmp_path):
    torch.save(torch.nn.Sequential(torch.nn.ReLU(), model_trt), tmp_path / "model.pth")
    loaded = torch.load(tmp_path / "model.pth", weights_only=False)
    assert os.path.getsize(tmp_path / "model.pth") < 1.1 * len(model_trt.engine_bytes) + 20_000
    return loaded[1]


def through_copy(model_trt, tmp_path):
    return copy.copy(model_trt)


def through_a_parent(model_trt, tmp_path):
    parent = torch.nn.Sequential(torch.nn.Linear(3, 3), model_trt)
    other = torch.nn.Sequential(torch.nn.Linear(3, 3), TRTModule())
    other.load_state_dict(parent.state_dict())
    return other[1]


COPIES = [
    through_torch_save,
    through_safetensors,
    through_a_file,
    through_bytes,
    through_pickle,
    through_torch_save_of_the_module,
    through_copy,
    through_deepcopy,
    through_a_parent,
]


@pytest.mark.parametrize("route", COPIES, ids=lambda f: f.__name__)
def test_an_engine_survives(route, device, tmp_path):
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()).eval().to(device)
    model_trt = torch2rt(made, [torch.randn(2, 3, device=device)], max_batch_size=4)
    again = route(model_trt, tmp_path)
    assert again is not model_trt
    assert again.engine_bytes == model_trt.engine_bytes
    assert again.interface == model_trt.interface
    assert again.cuda_graph == model_trt.cuda_graph
    if device.type == "cuda":
        x = torch.randn(3, 3, device=device)
        compare(again(x), made(x))
        compare(model_trt(x), made(x))


def test_keep_network_false_drops_it():
    model_trt = torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], keep_network=False)
    assert model_trt.network is None


def test_repr_says_what_it_takes():
    assert "float32[1..4, 3]" in repr(torch2rt(torch.nn.ReLU(), [torch.randn(2, 3)], max_batch_size=4))


# On a GPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(device):
    if device.type != "cuda":
        pytest.skip("runs the engine: needs --device cuda")
    return device


def test_a_plain_engine_is_taken_too(gpu):
    made = torch.nn.Sequential(torch.nn.Linear(3, 5), torch.nn.ReLU()).eval().to(gpu)
    x = torch.randn(2, 3, device=gpu)
    plain = TRTModule.from_engine(torch2rt(made, [x], max_batch_size=4).engine_bytes)
    x = torch.randn(3, 3, device=gpu)
    compare(plain(x), made(x))


@pytest.mark.parametrize("which", ["default", "own"])
def test_calls_are_ordered_with_the_callers_stream(gpu, which):
    made = module(lambda self, x: (x @ x) * 1e-3 + 1).to(gpu)
    x = torch.randn(1024, 1024, device=gpu)
    model_trt = torch2rt(made, [x])
    stream = torch.cuda.default_stream() if which == "default" else torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for _ in range(20):
            y = x
            for _ in range(5):
                y = model_trt(y * 0.5)
            expected = x
            for _ in range(5):
                expected = made(expected * 0.5)
            compare(y, expected, 1e-3, 1e-3)


def test_inputs_of_any_layout_and_offset(gpu):
    made = module(lambda self, x: x * 2 + 1)
    base = torch.randn(5, 4, 7, device=gpu)
    model_trt = torch2rt(made, [base[1:, :, 0].clone()], max_batch_size=8)
    for x in (
        base[1:, :, 3],
        base[:, :, 1][2:],
        torch.randn(4, 5, device=gpu).t(),
        torch.randn(33, device=gpu)[1:13].view(3, 4),
    ):
        compare(model_trt(x), made(x))


def test_many_calls_do_not_mix_up_their_results(gpu):
    made = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval().to(gpu)
    model_trt = torch2rt(made, [torch.randn(2, 64, device=gpu)], max_batch_size=64)
    inputs = [torch.randn(i % 64 + 1, 64, device=gpu) for i in range(200)]
    results = [model_trt(x) for x in inputs]
    for x, y in zip(inputs, results, strict=True):
        compare(y, made(x))


def test_threads_may_share_a_module(gpu):
    import concurrent.futures

    made = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()).eval().to(gpu)
    model_trt = torch2rt(made, [torch.randn(2, 64, device=gpu)], max_batch_size=16)

    def work(seed):
        generator = torch.Generator(device=gpu).manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for i in range(50):
                x = torch.randn(i % 16 + 1, 64, device=gpu, generator=generator)
                compare(model_trt(x), made(x))
        return True

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.parametrize(
    ("flavour", "version", "override", "capability", "expected"),
    [
        ("tensorrt_rtx", "1.4.0.76", "0", (9, 0), True),
        ("tensorrt_rtx", "1.6.1.120", "0", (9, 0), False),
        ("tensorrt_rtx", "1.4.0.76", None, (9, 0), False),
        ("tensorrt_rtx", "1.4.0.76", "0", (8, 9), False),
        ("tensorrt", "10.3.0", "0", (9, 0), False),
    ],
)
def test_engines_that_would_compute_wrong_are_refused(monkeypatch, flavour, version, override, capability, expected):
    monkeypatch.setattr(quirks, "VERSION", version)
    monkeypatch.setattr(quirks, "IS_RTX", flavour == "tensorrt_rtx")
    monkeypatch.setattr(quirks, "is_listed", {(9, 0): False, (8, 9): True}.get)
    monkeypatch.delenv("NVIDIA_TF32_OVERRIDE", raising=False)
    if override is not None:
        monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", override)
    assert bool(quirks.why_no_dynamic_shapes(capability)) == expected
