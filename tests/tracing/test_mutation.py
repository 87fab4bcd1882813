"""Writes: to a tensor, to a view, to what is viewed. The result equals eager's, or the conversion is refused."""

import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, Size, bools, case, check_case, half, ints, parametrize

from torch2rt import ConversionError, torch2rt

P = Size("P", 2, 3, 5)


def row(*inputs, modes=("static", "dynamic")):
    """A decorated function as a row of the table."""
    return lambda function: ROWS.append(case(function, inputs, id=function.__name__, modes=modes))


ROWS = []


# In place -------------------------------------------------------------------------------------------------------------


@row((B, 3, S))
def operators(x):
    y = x * 2
    y += x
    y *= y
    y -= 1
    y /= 3
    return y


@row((B, 3))
def methods(x):
    y = x.clone()
    y.add_(1, alpha=2).mul_(3).clamp_(-1, 2).relu_().sub_(x)
    y.masked_fill_(x > 0, 7)
    return y


@row(ints(B, 3))
def integers(x):
    y = x + 1
    y += 2
    y //= 3
    y %= 5
    return y


@row((B, 3))
def functional_inplace(x):
    y = x + 1
    F.relu(y, inplace=True)
    F.leaky_relu(y, 0.3, True)
    return F.hardtanh(y, inplace=True), y


@row((B, 4))
def modules_inplace(x):
    return torch.nn.Sequential(torch.nn.ReLU(inplace=True), torch.nn.Hardtanh(inplace=True), torch.nn.SiLU(True))(x + 0)


@row((B, 3))
def returned_is_the_same(x):
    y = x + 1
    z = y.add_(1)
    z.mul_(2)
    return y, z


@row((B, 3), (3,))
def out_argument(x, y):
    z = torch.empty_like(x)
    torch.add(x, y, out=z)
    w = z + 1
    torch.mul(w, 2, out=z)
    return z, w


@row((B, 3), half(3))
def copied(x, y):
    z = x * 2
    z[:, 1:].copy_(y[1:])
    w = torch.zeros_like(x)
    w.copy_(y)
    return z, w


@row((B, 3))
def kept_before_a_write(x):
    y = x + 1
    z = y * 2
    y.zero_()
    return y, z


@row((B, 3))
def to_itself(x):
    y = x * 1
    y.copy_(y + y)
    y.add_(y)
    return y


@row((B, 3))
def promoted_back(x):
    y = x.half()
    y += x
    return y


@row((B, 3))
def broadcast_in(x):
    y = x + torch.zeros(2, 1, 1, device=x.device)
    y += x[0]
    y[1] -= x
    return y


@row((B, 3))
def of_a_real_tensor(x):
    out = torch.zeros(3, 4, device=x.device)
    out[0] = x[0, 0]
    out[1:, 2] = x[0, 1:]
    out += 1
    return out


@row((3, S))
def of_a_real_list(x):
    kept = [torch.zeros(3, device=x.device) for _ in range(2)]
    for i in range(2):
        kept[i] += x[:, i]
    return torch.stack(kept)


@row((B, 3))
def real_first_read_then_written(x):
    table = torch.arange(3.0, device=x.device)
    y = x + table
    table += 1
    z = x + table
    table[0] = x[0, 0]
    return y, z, x + table


# Square brackets ------------------------------------------------------------------------------------------------------


@row((P, 4, 5))
def items(x):
    y = x + 0
    y[0] = 1
    y[:, 1] = x[:, 0]
    y[..., -1] = 2
    y[1, 2, 3] = x[0, 0, 0]
    y[:, None, 3] = 5
    return y


@row((B, 6, 5))
def ranges(x):
    y = x + 0
    y[:, 1:3] = x[:, 3:5]
    y[:, :, -2:] = 0
    y[:, ::2] *= 2
    y[:, 1::3, 1:4:2] = 9
    return y


@row((B, S))
def ranges_of_a_dynamic_size(x):
    y = x + 0
    y[:, -2:] = 0
    y[:, : x.shape[1] // 2] += 1
    y[:, 1::2] = x[:, 1::2] * 3
    y[:, x.shape[1] - 1] = 4
    y[:, 1:-1] -= 1
    return y


@row((B, 3))
def everything(x):
    y = torch.empty_like(x)
    y[:] = x
    z = torch.empty_like(x)
    z[...] = 3
    return y, z


@row((B, 3, S), (B, 3, S))
def masks(x, y):
    z = x + 0
    z[z > 0] = 0
    z[y > 0] = x.new_tensor(2)
    z[:, y[0, :, 0] > 0] = -1
    z[y.sum(-1) > 0] = x[0, 0]
    z[(y > 0) & (x < 1)] = 3
    return z


@row((B, 4), modes=("static",))
def mask_rows(x):
    z = x + 0
    z[x[:, 0] > 0] = x[:1] * 2
    return z


@row((B, 3, 2))
def constant_masks(x):
    z = x + 0
    z[:, torch.tensor([True, False, True], device=x.device)] = x[:, :2] * 2
    z[:, [False, True, False]] = 3
    return z


@row((3, 4, S), ints(2, low=-3, high=0))
def index_tensors(x, i):
    y = x + 0
    y[[0, 2]] = x[[2, 0]]
    y[torch.tensor([1, -1], device=x.device), torch.tensor([0, 3], device=x.device)] = 7
    y[0, [3, 1]] = x[1, :2]
    y[:, [0, 1], 2] = x[:, 2:, 1]
    y[i[:1], :, [0, 3]] = 5
    return y


@row((3, 4), ints(B, low=-3, high=3))
def computed_index(x, i):
    y = x + 0
    y[i] = 0
    y[:, i] = 1
    y[:, [-1, 0]] = x[:, :2]
    y[i[:1], 1] = x[0, 0]
    return y


@row((B, 4))
def computed_index_without_dimensions(x):
    y = x + 0
    y[:, x[0].argmax()] = 0
    y[0].index_fill_(0, x[0].argmin(), 2)
    z = x[0] * 1
    z[x[0].argmin()] = x[0, 1]
    return y, z


@row((B, 4))
def augmented_items(x):
    y = x * 2
    y[:, 1] += 1
    y[:, [0, 2]] *= 3
    y[:, 2:] -= x[:, :2]
    return y


# Views ----------------------------------------------------------------------------------------------------------------


@row((B, 3, 4))
def base_sees_views(x):
    y = x * 2
    y.view(-1).mul_(2)
    y.transpose(1, 2)[:, 1] = 0
    y.permute(2, 0, 1)[0].add_(1)
    y.unsqueeze(1)[:, 0, 1] = 5
    y.mT[:, 2] = 6
    y.flatten(1)[:, 3] = 7
    y.reshape(x.shape[0], 2, 6)[:, 1, 1] = 8
    y.unflatten(2, (2, 2))[:, :, 1, 1] = 9
    y.movedim(0, -1)[0, 0] = 10
    return y


@row((B, 3, 4))
def views_see_the_base(x):
    y = x * 2
    views = [y.flatten(), y.mT, y[:, 1], y[..., ::2], y.unsqueeze(0), y.view(-1, 4), y.diagonal(0, 1, 2)]
    views += [y.detach(), y.data]
    y.add_(x)
    y[:, 0] = 3
    return views


@row((B, 4, 3))
def views_see_each_other(x):
    y = x + 0
    a, b = y.chunk(2, 1)
    rows = y.unbind(1)
    last = y[..., -1]
    a.mul_(2)
    rows[3].zero_()
    b[:, 0] += 1
    last[:, 1] = 9
    return a, b, rows, last, y


@row((B, 6))
def through_split(x):
    y = x + 0
    a, b, c = y.split([1, 2, 3], 1)
    b.mul_(2)
    c.copy_(c + 1)
    d, e = y.split(4, 1)
    e.zero_()
    return y, a, b, c, d


@row((B, 6))
def through_tensor_split(x):
    y = x + 0
    a, b, c = y.tensor_split(3, 1)
    b += 1
    return a, b, c, y


@row((3, 4, S))
def through_a_diagonal(x):
    y = x + 0
    y.diagonal()[:, 1] = 5
    y.diagonal(1, 0, 1).mul_(2)
    torch.diagonal(y, offset=-1, dim1=1, dim2=0).zero_()
    return y


@row((3, 4))
def diagonal_filled(x):
    y = x + 0
    y.fill_diagonal_(2)
    return y


@row((B, 2, 3, 4))
def chains(x):
    y = x + 0
    y[:, 1].transpose(1, 2)[:, 1:3].view(x.shape[0], 2, 3)[..., 0] = 7
    y.transpose(1, 3)[:, 2].chunk(2, 1)[1].mul_(3)
    return y


@row((B, 1, 3))
def squeezed(x):
    y = x + 0
    z = y.squeeze(1)
    z[:, 0] = 1
    z.unsqueeze(-1)[:, 1] = 2
    return y, z


@row((B, 3))
def view_of_a_view_of_a_real_tensor(x):
    state = torch.zeros(2, 3, device=x.device)
    state[0] = x[0]
    view = state[1]
    view += x[0]
    state.t()[0] = 5
    return state, view


@row((B, 3))
def reshape_that_copies(x):
    y = x + torch.zeros(2, 1, 1, device=x.device)
    z = y.transpose(0, 2).reshape(-1)
    z.zero_()
    w = y.flatten(1).clone()
    w += 1
    return y, z, w


@row((B, 3, 4))
def contiguous_copies_or_does_not(x):
    y = x * 2
    same, copy = y.contiguous(), y.mT.contiguous()
    same += 1
    copy.zero_()
    return y, same, copy


@row((B, 3))
def in_place_on_a_slice_result(x):
    y = x * 2
    y[:, 1:].relu_()
    y[:, 0].clamp_(min=0).add_(1)
    torch.sigmoid_(y[:, 2])
    return y


@row((B, 3, 4))
def shape_changed_in_place(x):
    y = x * 2
    y.unsqueeze_(1)
    y.squeeze_(1)
    y.transpose_(1, 2)
    y += 1
    z = x[0] * 1
    z.t_()
    return y, z * 2


@row((B, 3, 4))
def view_changed_in_place(x):
    y = x * 2
    z = y[:, 1]
    z.unsqueeze_(0)
    z += 1
    y[:, 1, 2] = 3
    return y, z


@row((B, 3))
def written_in_a_loop(x):
    out = torch.zeros(x.shape[0], 4, 3, device=x.device)
    h = x
    for t in range(4):
        h = h * 0.5 + 1
        out[:, t] = h
    return out


@row((B, 3), bools(B, 3))
def where_then_write(x, m):
    y = torch.where(m, x, 0)
    y[~m] = -1
    y.masked_fill_(m, 2)
    return y


@row((B, 3))
def chosen_is_a_copy(x):
    y = x + 0
    y[True].zero_()
    y[:, [0, 1]].zero_()
    y[torch.tensor(True, device=x.device)].zero_()
    y[:, torch.tensor([True, False, True], device=x.device)].zero_()
    y[None].add_(1)
    return y


@row((B, 4, 3))
def data_attribute(x):
    y = x + 1
    y.data.mul_(2)
    y.detach().add_(1)
    return y


@row((B, 3))
def set_item_of_another_dtype(x):
    y = x.int()
    y[:, 0] = x[:, 0] * 10
    y[:, 1] = 2.7
    z = x.half()
    z[:, 1:] = x[:, 1:]
    return y, z


@row((B, 3))
def swapped(x):
    y = x + 0
    y[:, 0], y[:, 1] = y[:, 1], y[:, 0]
    y[:, [0, 1]] = y[:, [1, 2]]
    return y


@row(ints(B, 3))
def zero_dimensional(x):
    y = x.sum()
    z = y.view(1)
    y += 1
    z.mul_(2)
    return y, z


# Constants that the inputs are written into ---------------------------------------------------------------------------


@row((B, 3))
def parts_of_a_constant(x):
    out = torch.zeros(4, 3, device=x.device)
    out[1].copy_(x.sum(0))
    tail = out[2:]
    tail += 1
    turned = out.t()
    turned[0, 0] = 7.0
    return out, tail, turned


@row((B, 3))
def views_of_a_constant_made_before_and_after(x):
    out = torch.zeros(4, 3, device=x.device)
    a, b = out.chunk(2)
    flat = a.reshape(-1)
    b[:, 1] = x.sum()
    a.mul_(2)
    out.add_(x.sum())
    return out, a, b, flat, b.neg()


@row((2, 3, 5, 6))
def images_of_unlike_sizes_in_a_batch(x):
    batch = x.new_full((2, 3, 8, 8), 0.5)
    for index, image in enumerate(x):
        batch[index, :, : 5 - index, :6].copy_(image[:, index:])
    return batch


@row((B, 3))
def constant_written_to_for_real_and_then_from_inputs(x):
    state = torch.ones(3, device=x.device)
    head = state[:2]
    state[1] = 5
    head += x.sum()
    state *= 2
    return state, head


@parametrize(ROWS)
def test_equal_to_eager(row, mode, device):
    check_case(row, mode, device)


# Refused --------------------------------------------------------------------------------------------------------------


class State(torch.nn.Module):
    def __init__(self, write):
        super().__init__()
        self.register_buffer("steps", torch.zeros(3))
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.write = write

    def forward(self, x):
        y = x + self.steps
        self.write(self, x)
        return y + self.weight


def mask_and_index(x):
    y = x * 2
    y[x[:, 0] > 0, [0]] = 1
    return y


def assign_data(x):
    y = x * 2
    y.data = x
    return y


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.add_(1), "writes to its input 'input_0' in place"),
        (lambda x: x[0].zero_() + x, "writes to its input"),
        (lambda x: x.view(-1).mul_(2), "writes to its input"),
        (lambda x: F.relu(x, inplace=True), "writes to its input"),
        (lambda x: x.t_(), "input"),
        (lambda x: (x * 2).expand(2, 4, 3)[0].add_(1), "writing through"),
        (lambda x: (x * 2)[x > 0].add_(1), "depends on data"),
        (mask_and_index, "how many elements a computed mask selects"),
        (lambda x: (x * 2).resize_(2, 6), "resize_"),
        (lambda x: (x * 2).set_(x), "set_"),
        (assign_data, "x.data"),
        (lambda x: (x * 2).unfold(0, 2, 2).zero_(), "writing through"),
        (lambda x: (x * 2).normal_(), "random"),
    ],
    ids=range(13),
)
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(4, 3)])


def add_one(module, x):
    module.steps += 1


def add_input(module, x):
    module.steps.add_(x[0])


def set_item(module, x):
    module.steps[0] = x[0, 0]


def set_parameter(module, x):
    module.weight.data.mul_(2)


def through_a_view(module, x):
    module.steps[1:].copy_(x[0, 1:])


def set_parameter_from_input(module, x):
    module.weight.data.mul_(x[0])


def detached_buffer(module, x):
    module.steps.detach()[0] = x[0, 0]


WRITES = [add_one, add_input, set_item, set_parameter, through_a_view, set_parameter_from_input, detached_buffer]


@pytest.mark.parametrize("write", WRITES)
def test_state_is_refused(write):
    with pytest.raises(ConversionError, match=r"'steps'|'weight'|view of a constant"):
        torch2rt(State(write), [torch.randn(4, 3)])


def view_then_transpose(x):
    y = x * 2
    z = y[0]
    y.t_()
    z += 1
    return y


def test_shape_of_a_viewed_tensor_changed_in_place():
    with pytest.raises(ConversionError, match="changes the shape of a tensor that has views"):
        torch2rt(Call(view_then_transpose), [torch.randn(4, 3)])


def stale_detached_constant(x):
    state = torch.zeros(3, device=x.device)
    alias = state.detach()
    state += x[0]
    return alias + x


def transposed_then_written(x):
    y = x * 2
    z = y.mT.contiguous()  # y's own memory where the batch and the rows are 1
    z += 1
    return y


def base_written_after_a_reshape(x):
    y = x * 2
    z = y.transpose(0, 1).reshape(-1)
    y += 1
    return z


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (stale_detached_constant, (4, 3), None),
        (transposed_then_written, (4, 1, 3), None),
        (transposed_then_written, (4, 2, 3), None),
        (base_written_after_a_reshape, (4, 3), r"depends on a dynamic size"),
    ],
)
def test_sharing_of_memory_that_depends_on_sizes(function, shape, message, device):
    if message is None:
        check_case(case(function, [(B, *shape[1:])]), "dynamic", device)
        return
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(shape)], max_batch_size=8)
