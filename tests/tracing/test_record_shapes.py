"""What record_shapes sees, and what it proposes."""

import pytest
import torch
from harness.threads import at_once
from test_tracing import module

from torch2rt import InputError, record_shapes, torch2rt

BOTH = module(lambda self, x, *, mask=None, scale=1: x * scale if mask is None else x * mask)


def recorded(calls, made=BOTH):
    with record_shapes(made) as shapes:
        for args, kwargs in calls:
            made(*args, **kwargs)
    made(torch.randn(99, 99))  # is not seen
    return shapes


def rows(*sizes):
    return [((torch.randn(size, 3),), {}) for size in sizes]


def masked(*sizes):
    return [((torch.randn(size, 3),), {"mask": torch.randn(size, 1)}) for size in sizes]


def test_calls_are_counted_by_shapes_and_form():
    shapes = recorded([*masked(2, 2, 5), *rows(7), ((torch.randn(8, 3),), {"scale": 3})])
    assert shapes.names == ["x", "mask"] and shapes.others == 2
    assert shapes.counts == {((2, 3), (2, 1)): 2, ((5, 3), (5, 1)): 1}
    assert shapes.proposal() == {
        "min_shapes": {"x": (2, 3), "mask": (2, 1)},
        "opt_shapes": {"x": (2, 3), "mask": (2, 1)},
        "max_shapes": {"x": (5, 3), "mask": (5, 1)},
    }
    assert str(shapes).startswith(
        "3 calls with 2 sets of shapes, and 2 calls of other forms\n   66.7 %  x (2, 3), mask"
    )


@pytest.mark.parametrize(
    ("sizes", "opts"),
    [
        ([4], [4]),
        ([1, 8, 8, 8, 9], [8]),
        ([1, 2, 3], [2]),
        ([1] * 10 + [64] * 10, [1, 64]),
        ([1] * 10 + [64] * 9 + [4000] * 9, [64, 1, 4000]),
        ([5, 6, 7, 8, 9] * 3, [7]),
        ([1] * 500 + [64], [1]),  # a rare one pays for no profile
    ],
)
def test_opt_shapes_are_where_calls_are(sizes, opts):
    proposal = recorded(rows(*sizes)).proposal()
    given = proposal["opt_shapes"] if isinstance(proposal["opt_shapes"], list) else [proposal["opt_shapes"]]
    assert [one["x"] for one in given] == [(size, 3) for size in opts]
    assert proposal["min_shapes"] == {"x": (min(sizes), 3)} and proposal["max_shapes"] == {"x": (max(sizes), 3)}


def test_no_more_profiles_than_asked_for():
    shapes = recorded(rows(*[10**turn for turn in range(6)]))
    assert [len(shapes.proposal(n)["opt_shapes"]) for n in (2, 3, 4)] == [2, 3, 4]
    assert isinstance(shapes.proposal(1)["opt_shapes"], dict)
    with pytest.raises(InputError, match="profiles=0"):
        shapes.proposal(0)


def test_a_proposal_converts_and_serves_what_was_recorded():
    made = module(lambda self, x, *, mask: (x + mask).relu())
    shapes = recorded(masked(1, 1, 64, 64), made=BOTH)
    seen = []
    model_trt = torch2rt(
        made,
        [torch.randn(2, 3)],
        kwargs={"mask": torch.randn(2, 1)},
        configure=lambda config: seen.append(config.num_optimization_profiles),
        **shapes.proposal(),
    )
    assert seen == [2] and len(model_trt.interface.profiles) == 2
    for size in (1, 33, 64):
        x, mask = torch.randn(size, 3), torch.randn(size, 1)
        assert torch.equal(model_trt.reference()(x, mask=mask), made(x, mask=mask))


def test_threads_are_counted_together():
    with record_shapes(BOTH) as shapes:
        at_once([lambda: [BOTH(torch.randn(3, 3)) for _ in range(200)] for _ in range(4)])
    assert shapes.counts == {((3, 3),): 800}


def test_an_error_of_the_module_ends_the_recording():
    made = module(lambda self, x: x.view(7))
    with pytest.raises(RuntimeError), record_shapes(made) as shapes:
        made(torch.randn(3))
    assert shapes.counts == {((3,),): 1} and not made._forward_pre_hooks


@pytest.mark.parametrize(
    ("calls", "problem"),
    [
        ([], "No call was recorded"),
        ([((torch.randn(2), object()), {})], r"inputs\[0\]\[1\]: a object is not a tensor"),
        ([*rows(2), ((torch.randn(2),), {})], r"'args_0' came with \[1, 2\] dimensions"),
    ],
)
def test_what_gives_no_proposal_is_an_error_and_prints(calls, problem):
    shapes = recorded(calls, module(lambda self, *args: args[0]))
    with pytest.raises(InputError, match=problem):
        shapes.proposal()
    assert str(shapes)


def test_only_modules_are_watched():
    with pytest.raises(InputError, match="not a function"), record_shapes(lambda x: x):
        pass
