"""Several optimization profiles: how they are asked for, what an engine has, and that every call is right."""

import json
import random

import pytest
import torch
from harness.threads import at_once
from test_callers import GRAPHS, as_told
from test_tracing import module

from torch2rt import GraphCache, InputError, TRTModule, torch2rt, trace
from torch2rt.input_ranges import _sets
from torch2rt.interface import Interface

TWO = ["x", "y"]
A, B, C, D = (2, 3), (4, 3), (6, 3), (8, 3)


@pytest.mark.parametrize(
    ("names", "given", "expected"),
    [
        (["x"], None, [None]),
        (["x"], A, [A]),
        (["x"], [A], [[A]]),
        (["x"], [A, B], [A, B]),
        (["x"], [[A], [B], [C]], [[A], [B], [C]]),
        (["x"], {"x": A}, [{"x": A}]),
        (["x"], [{"x": A}], [[{"x": A}]]),
        (["x"], [{"x": A}, {"x": B}], [{"x": A}, {"x": B}]),
        (TWO, [A, B], [[A, B]]),
        (TWO, [[A, B]], [[[A, B]]]),
        (TWO, [[A, B], [C, D]], [[A, B], [C, D]]),
        (TWO, ([A, B], (C, D)), [[A, B], (C, D)]),
        (TWO, [{"x": A}, {"x": B}], [{"x": A}, {"x": B}]),
        (TWO, [{"x": A, "y": B}, {"x": C}], [{"x": A, "y": B}, {"x": C}]),
        (TWO, [{"a": A, "b": B}], [[{"a": A, "b": B}]]),  # nested as the inputs are
        (TWO, [{"x": A}, {"y": B}], [[{"x": A}, {"y": B}]]),
        (["x", "y", "z", "w"], [[A, B], [C, D]], [[[A, B], [C, D]]]),
    ],
)
def test_one_set_of_shapes_or_several(names, given, expected):
    assert _sets(given, names) == expected


def sums(self, x, y):
    return x + y[:, :3], y * 2


X, Y = torch.randn(2, 3), torch.randn(2, 5)
RANGES = {"min_shapes": [(1, 3), (1, 5)], "max_shapes": [(64, 3), (64, 5)]}
SETS = [{"x": (2, 3), "y": (2, 5)}, {"x": (33, 3), "y": (33, 5)}, [(9, 3), (9, 5)], {"x": (2, 3), "y": (2, 5)}]


def test_an_engine_has_a_profile_for_each_set_of_shapes():
    seen = []
    model_trt = torch2rt(
        module(sums),
        [X, Y],
        opt_shapes=SETS[:2],
        configure=lambda c: seen.append(c.num_optimization_profiles),
        **RANGES,
    )
    assert seen == [2]
    interface = model_trt.interface
    assert interface.profiles == [[(2, 3), (2, 5)], [(33, 3), (33, 5)]]
    saved = TRTModule()
    saved.load_state_dict(model_trt.state_dict())
    assert saved.interface.profiles == interface.profiles
    assert Interface.from_json(json.loads(json.dumps(interface.to_json()))) == interface
    for size in (1, 33, 64):
        x, y = torch.randn(size, 3), torch.randn(size, 5)
        for actual, expected in zip(model_trt.reference()(x, y), module(sums)(x, y), strict=True):
            assert torch.equal(actual, expected)


def test_sets_that_are_equal_are_one():
    interface = trace(module(sums), [X, Y], opt_shapes=[SETS[0], SETS[1], SETS[3]], **RANGES).meta["torch2rt"].interface
    assert len(interface.profiles) == 2


def test_the_nearest_is_by_ratio_and_the_first_of_several():
    interface = trace(module(lambda self, x: x * 2), [torch.randn(4, 6)], min_shapes=[(1, 1)], max_shapes=[(64, 64)],
                      opt_shapes=[[(4, 6)], [(32, 6)], [(4, 60)]]).meta["torch2rt"].interface  # fmt: skip
    chosen = {(4, 6): 0, (11, 6): 0, (12, 6): 1, (64, 7): 1, (5, 20): 2, (1, 1): 0, (4, 18): 0, (33, 60): 2}
    assert {shape: interface.nearest_profile([shape]) for shape in chosen} == chosen


@pytest.mark.parametrize(
    ("sets", "problem"),
    [
        ([SETS[0], {"x": (65, 3), "y": (65, 5)}], "min 1, opt 65, max 64"),
        ([SETS[0], {"x": (0, 3), "y": (0, 5)}], "min 1, opt 0, max 64"),
        ([SETS[0], {"x": (7, 3)}], r"no call may have: The model needs x.shape\[0\] == y.shape\[0\], got x \(7, 3\)"),
        ([SETS[0], {"z": (7, 3)}], "opt_shapes"),
        ([SETS[0], {"x": (7, 3, 1), "y": (7, 5)}], "gives input 'x' 3 dimensions"),
    ],
)
def test_sets_that_cannot_be_are_refused(sets, problem):
    with pytest.raises(InputError, match=problem):
        torch2rt(module(sums), [X, Y], opt_shapes=sets, verify=False, **RANGES)


@pytest.fixture(scope="module")
def model_trt(device):
    if device.type != "cuda":
        pytest.skip("runs engines: needs --device cuda")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 5, 3), torch.nn.ReLU(), torch.nn.Conv2d(5, 4, 3)).eval().to(device)
    model_trt = torch2rt(
        net,
        [torch.randn(2, 3, 16, 16, device=device)],
        min_shapes=[(1, 3, 8, 8)],
        opt_shapes=[[(1, 3, 8, 8)], [(4, 3, 32, 32)], [(2, 3, 8, 32)]],
        max_shapes=[(4, 3, 32, 32)],
    )
    assert model_trt.engine.num_optimization_profiles == 3
    return net, model_trt


@GRAPHS
def test_every_call_is_right_whatever_its_profile(model_trt, device, graph):
    net, model_trt = model_trt
    shapes = [(1, 3, 8, 8), (4, 3, 31, 32), (2, 3, 9, 30), (3, 3, 16, 16), (1, 3, 32, 8), (4, 3, 8, 8)]
    inputs = [torch.randn(shape, device=device) for shape in shapes]
    with torch.no_grad():
        expected = [net(x) for x in inputs]
    assert {model_trt.interface.nearest_profile([shape]) for shape in shapes} == {0, 1, 2}
    torch.cuda.synchronize()

    def work(seed):
        choose = random.Random(seed)
        stream = torch.cuda.default_stream() if seed == 0 else torch.cuda.Stream()
        with torch.cuda.stream(stream), torch.no_grad():
            worst = torch.zeros((), device=device)
            for _ in range(150):
                i = choose.randrange(len(inputs))
                error = (model_trt(inputs[i].clone()) - expected[i]).abs().amax()
                torch.maximum(worst, error, out=worst)
            assert worst.item() < 1e-3

    with as_told(model_trt, GraphCache(shapes=8) if graph else False):
        at_once([lambda seed=seed: work(seed) for seed in range(4)])


def test_a_saved_engine_has_its_profiles(model_trt, device, tmp_path):
    net, model_trt = model_trt
    model_trt.save_engine(tmp_path / "model.engine")
    again = TRTModule.from_engine(tmp_path / "model.engine")
    with torch.no_grad():
        for shape in ((1, 3, 9, 9), (4, 3, 32, 31), (1, 3, 9, 9)):
            x = torch.randn(shape, device=device)
            assert (again(x) - net(x)).abs().max() < 1e-3
    assert {place[1] for place in again._ready().idle} == {0, 1}
