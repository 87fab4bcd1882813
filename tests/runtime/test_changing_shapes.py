"""Calls whose shapes change, with the GPU's part played by the CPU: what is remembered, and what is right."""

import itertools
import random
import threading
import time

import pytest
import torch
from harness.fake_gpu import OTHER, SIDE, FakeGpu, rows
from harness.threads import at_once

from torch2rt import GraphCache
from torch2rt.errors import InputError
from torch2rt.runtime import fits
from torch2rt.runtime.idle_contexts import CHANGES, REPEATS


@pytest.fixture
def make(monkeypatch, without_gpu_memory):
    return lambda *specs, **options: FakeGpu(monkeypatch, specs or [rows()], **options)


def x(count, columns=5):
    return torch.randn(count, columns)


# What is remembered --------------------------------------------------------------------------------------------------


def test_shapes_that_were_met_are_not_asked_about_again(make):
    gpu = make(scratch=256)
    gpu.call(x(3))
    assert gpu.told() == [("x", (3, 5)), "memory", ("asked", "y")]
    gpu.call(x(3))
    assert gpu.told() == []
    gpu.call(x(4))
    gpu.told()
    for count in (3, 4, 3):
        gpu.call(x(count))
        assert gpu.told() == [("x", (count, 5)), "memory"]


def test_shapes_that_change_often_get_a_context_that_is_not_asked_for_memory(make):
    gpu = make(scratch=256)
    for turn in range(40):
        gpu.call(x(3 + turn % 2))
    exact, other = gpu.made
    assert exact.told.count("memory") == CHANGES + 1 and "memory" not in other.told
    assert other.memory[1] == 256 and exact.runs + other.runs == 40
    gpu.told()
    for turn in range(40):
        gpu.call(x(3 + turn % 2))
    assert gpu.told() == []  # each of them has one of the two


def test_shapes_that_repeat_go_back_to_an_exact_context(make):
    gpu = make(scratch=256)
    for turn in range(40):
        gpu.call(x(3 + turn % 3))
    gpu.told()
    for _ in range(3 * REPEATS):
        gpu.call(x(9))
    assert gpu.told().count("memory") == 1 and len(gpu.made) == 2
    runs = gpu.made[1].runs
    for _ in range(5):
        gpu.call(x(9))
        gpu.call(x(7))
    assert gpu.made[1].runs == runs + 5 and "memory" not in gpu.told()


def test_contexts_share_what_they_know(make):
    gpu = make(scratch=256)
    gpu.call(x(3))
    gpu.stream = OTHER
    gpu.told()
    gpu.call(x(3))
    assert len(gpu.made) == 2 and gpu.told() == [("x", (3, 5)), "memory"]


def test_only_inputs_whose_shape_has_changed_are_told(make):
    gpu = make(rows("x"), rows("xb", columns=3), scratch=256)
    gpu.call(x(3), x(4, 3))
    gpu.call(x(3), x(2, 3))
    gpu.told()
    gpu.call(x(3), x(4, 3))
    assert gpu.told() == [("xb", (4, 3)), "memory"]


def test_scratch_memory_is_asked_for_where_calls_take_their_own(make):
    gpu = make(scratch=None)
    for count in (3, 9, 3, 3):
        gpu.call(x(count))
    assert gpu.told().count("memory") == 3
    assert gpu.made[0].memory[1] == 4 * 3


def test_bad_shapes_are_refused_every_time_and_leave_a_pool_that_works(make):
    claim = (["eq", ["mod", ["dim", 0, 0], 2], 1], "x.shape[0] % 2 == 1")
    gpu = make(constraints=[claim])
    gpu.call(x(3))
    for bad in (x(65), x(4), x(3, 6), torch.ones(3, 5, 1), x(3).half(), [1.0], None, x(3).to("meta")):
        for _ in range(2):
            with pytest.raises(InputError):
                gpu.pool.run([bad])
        gpu.call(x(3))
        gpu.call(x(5))
    assert set(gpu.loaded.fits.known) == {((3, 5),), ((5, 5),)}


def test_after_an_error_a_context_is_told_everything_again(make):
    gpu = make(rows("x"), rows("xb"))
    gpu.call(x(3), x(4))
    gpu.call(x(5), x(4))
    context = gpu.made[0]
    context.refuses.append((3, 5))
    with pytest.raises(InputError, match="TensorRT refuses the shape"):
        gpu.pool.run([x(3), x(4)])
    context.refuses.clear()
    gpu.told()
    gpu.call(x(3), x(4))
    assert gpu.told() == [("x", (3, 5)), ("xb", (4, 5)), "memory"]
    gpu.fails.append(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        gpu.pool.run([x(3), x(4)])
    gpu.call(x(3), x(4))
    assert not gpu.loaded.lock.holders and len(gpu.made) == 1


def test_only_so_many_shapes_are_remembered(make, monkeypatch):
    monkeypatch.setattr(fits, "MOST", 10)
    gpu = make()
    for count in [*range(1, 41), *range(40, 0, -1)]:
        gpu.call(x(count))
        assert len(gpu.loaded.fits.known) <= 10


def test_an_idle_context_that_ran_last_with_the_shapes_is_taken(make):
    gpu = make(scratch=None)
    held = [gpu.pool.take([], []) for _ in range(3)]
    gpu.pool.idle[SIDE] = idle = []
    for execution, count in zip(held, (3, 4, 5), strict=True):
        execution.run([x(count)], SIDE)
        idle.append(execution)
    gpu.told()
    for count in (4, 3, 5, 5, 3, 4):
        gpu.call(x(count))
    assert gpu.told() == [] and sorted(map(id, idle)) == sorted(map(id, held))
    gpu.call(x(6))  # the one that was idle the longest is told
    assert held[2].shapes == [(6, 5)] and {e.shapes[0][0] for e in held} == {3, 4, 6}
    with pytest.raises(InputError):
        gpu.pool.run([None])
    assert len(idle) == 3


def is_done_beside_another_call(gpu, call):
    """Whether a call ends while another one runs; it has ended afterwards."""
    lock = gpu.loaded.lock
    lock.acquire("another call")
    thread = threading.Thread(target=call)
    thread.start()
    thread.join(0.05)
    waits = thread.is_alive()
    lock.release("another call")
    thread.join(10)
    assert not thread.is_alive()
    return not waits


def test_a_run_at_other_shapes_waits_for_the_others_and_they_for_it(make):
    gpu = make(scratch=256)
    gpu.call(x(3))
    assert is_done_beside_another_call(gpu, lambda: gpu.call(x(3)))
    for count in (4, 3):  # also at shapes that it has run with before
        assert not is_done_beside_another_call(gpu, lambda count=count: gpu.call(x(count)))
        assert is_done_beside_another_call(gpu, lambda count=count: gpu.call(x(count)))
    first = gpu.pool.unused_context()
    assert not is_done_beside_another_call(gpu, lambda: first.run([x(3)], OTHER))
    inexact = gpu.pool.unused_context(exact=False)
    for _ in range(2):
        assert not is_done_beside_another_call(gpu, lambda: inexact.run([x(3)], OTHER))


def test_runs_at_other_shapes_are_never_beside_another(make):
    """TensorRT's part looks who else is in it: contexts of many threads, streams, shapes and graphs."""
    gpu, inside, beside = make(rows(opts=(2, 32)), scratch=256), [], []

    def looked_into(context, run):
        def execute(stream):
            shapes = dict(context.shapes)
            changes, context.ran = shapes != context.ran, shapes
            inside.append(changes)
            time.sleep(0)
            if len(inside) > 1 and any(inside):
                beside.append(list(inside))
            done = run(stream)
            inside.remove(changes)
            return done

        return execute

    def context(make=gpu.loaded.create_context):
        if inside:
            beside.append("made")
        made = make()
        made.ran, made.execute_async_v3 = None, looked_into(made, made.execute_async_v3)
        return made

    gpu.loaded.create_context = context

    def work(seed):
        choose = random.Random(seed)
        gpu.current.stream = 10 + seed % 4
        for turn in range(120):
            count = choose.randint(1, 64) if turn % 30 < 15 else 5
            gpu.call(x(count), graph=GraphCache(shapes=4) if seed % 2 else False)

    at_once([lambda seed=seed: work(seed) for seed in range(6)])
    assert not beside and len(gpu.made) > 4


def test_threads_with_many_shapes(make):
    gpu = make(rows("x"), rows("xb", columns=3), scratch=512)

    def work(seed):
        choose = random.Random(seed)
        gpu.current.stream = 10 + seed % 3  # streams that threads share
        for _ in range(150):
            gpu.call(x(choose.randint(1, 64)), x(choose.randint(1, 64), 3))

    at_once([lambda seed=seed: work(seed) for seed in range(6)])
    assert len(gpu.made) <= 12 and not gpu.loaded.lock.holders


# Profiles ------------------------------------------------------------------------------------------------------------


def test_the_nearest_profile_is_chosen_and_has_contexts_of_its_own(make):
    gpu = make(rows(opts=(2, 32)), scratch=256)
    for count in (1, 3, 64, 20, 4, 1, 40):
        gpu.call(x(count))
    first, second = gpu.made
    assert (first.profile, second.profile) == (0, 1)
    assert [item for item in first.told if item[0] == "x"] == [("x", (n, 5)) for n in (1, 3, 4, 1)]
    assert [item for item in second.told if item[0] == "x"] == [("x", (n, 5)) for n in (64, 20, 40)]
    assert first.told[0] == ("profile", 0) and sum(item[0] == "profile" for item in gpu.told()) == 2


def test_graphs_and_threads_with_profiles(make):
    gpu = make(rows(opts=(2, 32)), scratch=256)

    def work(seed):
        choose = random.Random(seed)
        gpu.current.stream = 10 + seed % 2
        for _ in range(200):
            gpu.call(x(choose.choice([1, 2, 5, 12, 33, 64])), graph=GraphCache(shapes=4))

    at_once([lambda seed=seed: work(seed) for seed in range(4)])
    assert gpu.captured >= 4 and len(gpu.pool.graphs) <= 4
    assert {graph.execution.profile for graph in gpu.pool.graphs.values()} <= {0, 1}


def test_a_context_that_changes_its_profile_is_told_everything(make):
    gpu = make(rows("x", opts=(2, 32)), rows("xb", opts=(2, 32)), scratch=256)
    gpu.call(x(2), x(2))
    gpu.pool.unused.append(gpu.pool.idle[SIDE, 0].pop())
    gpu.told()
    gpu.call(x(32), x(32))
    assert gpu.told()[:3] == [("profile", 1), ("x", (32, 5)), ("xb", (32, 5))] and len(gpu.made) == 1


# Graphs --------------------------------------------------------------------------------------------------------------


def test_shapes_are_captured_when_they_come_back(make):
    gpu = make(scratch=256)
    for after in (1, 2, 4):
        before, count = gpu.captured, 20 + after
        for call in range(1, 7):
            gpu.call(x(count), graph=GraphCache(after=after))
            assert (gpu.captured > before) == (call >= after), (after, call)


def test_shapes_that_come_once_are_never_captured(make):
    gpu = make(rows(most=3000), scratch=256)
    for count in range(1, 2500):
        gpu.call(x(count), graph=True)
    assert gpu.captured == 0 and len(gpu.made) == 2
    assert len(gpu.pool.traffic.calls) < 5000


def test_recurring_shapes_are_all_replayed_and_captured_once(make):
    gpu, choose, elsewhere = (
        make(scratch=256),
        random.Random(0),
        {n: itertools.cycle((x(n), x(n))) for n in range(1, 9)},
    )
    for _ in range(40):
        gpu.call(next(elsewhere[choose.randint(1, 8)]), graph=True)
    captured, replayed = gpu.captured, gpu.replayed
    for _ in range(2000):
        gpu.call(next(elsewhere[choose.randint(1, 8)]), graph=True)
    assert gpu.captured == captured == 8 and gpu.replayed - replayed == 2000


def test_many_shapes_at_random_are_not_captured_again_and_again(make):
    gpu, choose = make(scratch=256), random.Random(1)
    for _ in range(6000):
        gpu.call(x(choose.randint(1, 64)), graph=True)
    assert gpu.captured <= 40 and len(gpu.pool.graphs) == 16
    assert gpu.replayed > 1000


def test_habits_change(make):
    """Shapes that come often take the place of those that came often before."""
    gpu, choose = make(scratch=256), random.Random(2)
    cache = GraphCache(shapes=4)
    for _ in range(3000):
        gpu.call(x(choose.randint(1, 4)), graph=cache)
    for _ in range(6000):
        gpu.call(x(choose.randint(11, 14)), graph=cache)
    assert {key[2][0][0] for key in gpu.pool.graphs} == {11, 12, 13, 14}
    assert len(gpu.made) <= 6  # contexts of graphs that are gone serve others


def test_shapes_that_were_evicted_are_not_captured_again_at_once(make):
    gpu = make(scratch=256)
    cache = GraphCache(shapes=1)
    for _ in range(2):
        gpu.call(x(3), graph=cache)
    for _ in range(1000):
        gpu.call(x(4), graph=cache)
    assert (SIDE, False, ((3, 5),)) not in gpu.pool.graphs
    captured = gpu.captured
    for _ in range(10):
        gpu.call(x(3), graph=cache)
    assert gpu.captured == captured


def test_inputs_that_lie_elsewhere_are_copied_by_the_first_graph(make):
    gpu = make(scratch=256)
    held = [x(3) for _ in range(4)]
    for tensor in held:
        gpu.call(tensor, graph=True)
    assert gpu.captured == 1
    same = x(5)
    for _ in range(4):  # a tensor that stays the same is read where it lies
        gpu.call(same, graph=True)
    (key,) = [key for key in gpu.pool.graphs if key[2] == ((5, 5),)]
    assert not gpu.pool.graphs[key].copies_inputs
    gpu.call(x(5), graph=True)
    assert gpu.pool.graphs[key].copies_inputs


def test_graphs_of_a_stream_share_memory_and_those_of_others_do_not(make):
    gpu = make(scratch=4 << 20)
    for stream in (SIDE, OTHER):
        gpu.stream = stream
        for count in (3, 4, 5) * 2:
            gpu.call(x(count), graph=True)
    graphs = gpu.pool.graphs
    blocks = {stream: {graphs[k].kept[1].data_ptr() for k in graphs if k[0] == stream} for stream in (SIDE, OTHER)}
    assert [len(found) for found in blocks.values()] == [1, 1] and blocks[SIDE] != blocks[OTHER]
    assert gpu.pool.memory.held() <= 2 * (2 << 20)


def test_memory_follows_what_the_graphs_need(make):
    """Shapes of very different needs come and go: the memory is within 1.5 times what those that are kept need."""
    gpu, choose = make(rows(most=200_000, columns=64), scratch=None), random.Random(3)
    cache = GraphCache(shapes=4, after=1)
    for _ in range(100):
        gpu.call(x(int(10 ** choose.uniform(0, 4)), 64), graph=cache)
        needs = [graph.need for graph in gpu.pool.graphs.values()]
        assert gpu.pool.memory.held() <= max(2 << 20, 1.5 * max(needs))
    gpu.pool._retire(list(gpu.pool.graphs))
    assert gpu.pool.memory.held() == 0


def test_graphs_hold_no_more_bytes_than_they_may(make):
    gpu = make(rows(most=200_000, columns=64), scratch=None)
    cache = GraphCache(bytes=3 << 20)
    for _ in range(3):
        gpu.call(x(20_000, 64), graph=cache)  # 10 MiB
    assert not gpu.pool.graphs
    for _ in range(3):
        gpu.call(x(1000, 64), graph=cache)
    assert len(gpu.pool.graphs) == 1 and gpu.pool.memory.held() <= 3 << 20
    gpu.stream = OTHER  # whose graphs get the memory of those that are not replayed any more
    for graph in gpu.pool.graphs.values():
        graph.calls = graph.calls_before = 0
    for _ in range(3):
        gpu.call(x(5000, 64), graph=cache)
    assert [key[0] for key in gpu.pool.graphs] == [OTHER]


@pytest.mark.parametrize("scratch", [None, 1 << 16], ids=["its own", "one size"])
def test_graphs_of_many_threads_streams_and_shapes_are_right(make, scratch):
    gpu = make(rows("x"), rows("xb", columns=3), scratch=scratch)

    def work(seed):
        choose = random.Random(seed)
        gpu.current.stream = 10 + seed % 3
        held = []
        for _ in range(200):
            tensors = [x(choose.choice([1, 7, 33, 60])), x(choose.choice([2, 50]), 3)]
            if choose.random() < 0.3:
                tensors[0] = tensors[0].T.contiguous().T  # to be copied first
            results = gpu.call(*tensors, graph=GraphCache(shapes=6, after=1))
            held = [*held[-5:], (tensors, results)]
            for before, after in held:  # results are nobody else's
                assert all(torch.equal(b, a * 2) for a, b in zip(before, after, strict=True))

    at_once([lambda seed=seed: work(seed) for seed in range(6)])
    assert gpu.replayed > 50 and len(gpu.pool.graphs) <= 6


def test_borrowed_outputs_are_the_graphs_own(make):
    gpu = make(scratch=256)
    inputs = [x(count) for count in (3, 4) * 3]  # each elsewhere, so that a graph copies them
    results = [gpu.call(tensor, graph=True, borrow=True)[0] for tensor in inputs]
    assert results[2].data_ptr() == results[4].data_ptr() != results[3].data_ptr() == results[5].data_ptr()
    assert not torch.equal(results[0], results[4])  # of before there was a graph
    kept = results[4].clone()
    gpu.call(x(4), graph=True, borrow=True)
    assert torch.equal(results[4], kept)  # only a call with the same shapes writes there


@pytest.mark.parametrize(
    "options", [{"shapes": 0}, {"bytes": -1}, {"after": 0}, {"shapes": "many"}, {"after": 1.5}, {"shapes": True}]
)
def test_limits_are_whole_numbers(options):
    with pytest.raises(InputError, match=f"{next(iter(options))}=...\\)="):
        GraphCache(**options)
