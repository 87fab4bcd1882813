"""Several engines behind one TRTModule: each call goes to the one that serves its shapes; all else is as with one."""

import copy
import itertools
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from harness import compare
from test_tracing import module

from torch2rt import EngineError, InputError, TRTModule, torch2rt
from torch2rt.runtime.variants import VariantPools

ROWS, COLUMNS = range(1, 4), range(1, 10)


def _by_parity(self, x):
    y = F.pad(x, (0, 1)) if x.shape[1] % 2 else x * 2
    return y @ y.t() if x.shape[1] > 5 else y


def _of_several_forms(self, x):
    return {"sum": x.sum(1), "rows": x.shape[0]} if x.shape[1] % 2 else (x, x * 2)


def converted(forward, device):
    made = module(forward)
    example = torch.randn(2, 5, device=device)
    return made, torch2rt(made, [example], min_shapes=[(1, 1)], max_shapes=[(3, 9)])


@pytest.fixture(scope="module")
def by_parity(device):
    return converted(_by_parity, device)


def runner(model_trt, device):
    return model_trt if device.type == "cuda" else model_trt.reference()


def check_all(run, made, device):
    for shape in itertools.product(ROWS, COLUMNS):
        x = torch.randn(shape, device=device)
        compare(run(x), made(x))


def test_every_shape_is_served(by_parity, device):
    made, model_trt = by_parity
    assert len(model_trt.built.variants) == 4
    check_all(runner(model_trt, device), made, device)


def test_variants_may_return_values_of_several_forms(device):
    made, model_trt = converted(_of_several_forms, device)
    check_all(runner(model_trt, device), made, device)


def test_the_report_lists_the_variants(by_parity):
    _, model_trt = by_parity
    text = str(model_trt.report)
    assert text.count("test_dispatch.py:") == 4
    assert "variant 3: x.shape[1] " in text
    assert text in str(model_trt.report)
    assert "in 4 engines" in repr(model_trt)
    assert len({tuple(map(tuple, d.shapes)) for d in model_trt.report.verified.differences}) == 4


def test_variant_for_says_which_engine_serves_a_shape(by_parity):
    _, model_trt = by_parity
    for columns in COLUMNS:
        region = model_trt.variant_for([(2, columns)]).region
        assert f"x.shape[1] % 2 {'!=' if columns % 2 else '=='} 0" in region
        assert ("x.shape[1] > 5" in region) == (columns > 5)
    assert model_trt.variant_for({"x": (3, 4)}) == model_trt.variant_for((1, 4))
    with pytest.raises(InputError, match="the engine serves 1 to 9"):
        model_trt.variant_for([(2, 10)])
    alone = torch2rt(module(lambda self, x: x + 1), [torch.randn(2, 3)], max_batch_size=3)
    assert alone.variant_for([(3, 3)]).region == "every size of the range"
    with pytest.raises(InputError, match="serves 1 to 3"):
        alone.variant_for([(4, 3)])


@pytest.mark.parametrize("way", ["state_dict", "save_engine", "pickle", "deepcopy"])
def test_copies_and_files_hold_all_variants(by_parity, way, device, tmp_path):
    made, model_trt = by_parity
    if way == "state_dict":
        again = TRTModule()
        again.load_state_dict(model_trt.state_dict())
    elif way == "save_engine":
        model_trt.save_engine(tmp_path / "model.engine")
        again = TRTModule.from_engine(tmp_path / "model.engine")
    elif way == "pickle":
        again = pickle.loads(pickle.dumps(model_trt))
    else:
        again = copy.deepcopy(model_trt)
    assert again.built.variants == model_trt.built.variants
    assert again.report.variants == model_trt.report.variants
    for ours, theirs in zip(again.built.each(), model_trt.built.each(), strict=True):
        assert (ours.data, ours.interface) == (theirs.data, theirs.interface)
    if device.type == "cuda":
        check_all(again, made, device)


def test_a_network_of_each_is_kept_and_dropped(by_parity):
    _, model_trt = by_parity
    assert len(model_trt.network) == 4
    shallow = copy.copy(model_trt)
    shallow.drop_network()
    assert shallow.network is None


def test_a_shape_between_the_regions_is_refused_with_what_is_served(device):
    def forward(self, x):
        if x.shape[0] == 3:
            raise ValueError("three")
        return x * 2 if x.shape[0] > 4 else x

    made = module(forward)
    model_trt = torch2rt(made, [torch.randn(5, 2, device=device)], min_shapes=[(1, 2)], max_shapes=[(6, 2)])
    with pytest.raises(InputError, match=r"None of the engines serves x \(3, 2\)(.|\n)*\[1..4, 2\]"):
        runner(model_trt, device)(torch.randn(3, 2, device=device))


# Dispatch, with stand-ins for what needs a GPU ----------------------------------------------------------------------


class _Pool:
    """Stands in for a `ContextPool`: says which engine a call has reached."""

    device, index, uncapturable = torch.device("cpu"), 0, None

    def __init__(self, loaded):
        self.interface, self.inputs, self.calls = loaded.interface, self, []

    def check_one(self, position, tensor):
        if not isinstance(tensor, torch.Tensor):
            raise InputError(f"Input 'x' is a {type(tensor).__name__}")

    def run(self, tensors, graph=False, borrow=False):
        self.calls.append((tuple(tensors[0].shape), graph, borrow))
        return tensors


@pytest.fixture
def pools(by_parity, monkeypatch):
    monkeypatch.setattr("torch2rt.runtime.variants.ContextPool", _Pool)
    monkeypatch.setattr("torch2rt.runtime.variants.LoadedEngine", lambda engine, index: engine)
    return VariantPools(by_parity[1].built, None)


def test_a_shape_is_looked_up_once(pools, by_parity, monkeypatch):
    for shape in itertools.product(ROWS, COLUMNS):
        pools.run([torch.randn(shape)], True, True)
        index = by_parity[1].variant_for([shape]).index
        assert pools.pools[index].calls[-1] == (shape, True, True)
    monkeypatch.setattr(pools.dispatch, "find", None)
    for shape in itertools.product(ROWS, COLUMNS):
        pools.run([torch.randn(shape)])
    assert sum(len(pool.calls) for pool in pools.pools) == 2 * len(ROWS) * len(COLUMNS)


def test_the_table_of_shapes_is_bounded(pools, monkeypatch):
    monkeypatch.setattr("torch2rt.runtime.variants.REMEMBERED", 5)
    for shape in itertools.product(ROWS, COLUMNS):
        pools.run([torch.randn(shape)])
        assert 1 <= len(pools.table) <= 5


def test_calls_that_do_not_fit_are_refused_by_name(pools):
    with pytest.raises(InputError, match="the engine serves 1 to 9"):
        pools.run([torch.randn(2, 10)])
    with pytest.raises(InputError, match="has 1 dimensions"):
        pools.run([torch.randn(5)])
    with pytest.raises(InputError, match=r"torch\.float64"):
        pools.run([torch.randn(2, 5).double()])
    for name in ("loaded", "context"):
        with pytest.raises(EngineError, match="several engines"):
            getattr(pools, name)


# On a GPU -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_gpu(device):
    if device.type != "cuda":
        pytest.skip("runs the engine: needs --device cuda")


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_threads_and_graphs_take_turns_among_the_variants(by_parity, on_gpu, cuda_graph, device):
    made, model_trt = by_parity
    model_trt = copy.copy(model_trt)
    model_trt.cuda_graph = cuda_graph
    wrong = []

    def work(seed):
        generator = torch.Generator(device).manual_seed(seed)
        with torch.cuda.stream(torch.cuda.Stream()):
            for shape in list(itertools.product(ROWS, COLUMNS)) * 3:
                x = torch.randn(shape, device=device, generator=generator)
                if not torch.allclose(model_trt(x), made(x), rtol=1e-2, atol=1e-2):
                    wrong.append(shape)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert model_trt.cuda_graph_refused is None
