import functools

import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function
from torch.utils import _pytree as pytree

from torch2rt.vocabulary import (
    Context,
    activation,
    add,
    cast,
    check,
    composite,
    concat,
    converter,
    dims,
    is_traced,
    materialize,
    matmul,
    mul,
    narrow,
    permute,
    reshape,
    rewrite,
    shape_tensor,
    sub,
    torch,
    trt,
)

Kind, aten = trt.ActivationType, torch.ops.aten
CONSTANT = "the weights of a recurrent layer must be constant"
PACKED = "packed sequences have no fixed shape. Pass the padded tensor, and mask what lies beyond each length"

rewrite(PACKED, torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence)


def cell(function):
    """`composite`, for one step of a recurrent layer.

    Under autocast a GPU's kernel takes all its tensors in the lower precision. A CPU's is made of calls that autocast
    knows, as the bodies here are.
    """

    def register(body):
        @functools.wraps(body)
        def step(input, *args, **kwargs):
            device = input.device.type
            if device == "cpu" or not torch.is_autocast_enabled(device):
                return body(input, *args, **kwargs)
            low = torch.get_autocast_dtype(device)
            args, kwargs = pytree.tree_map_only(torch.Tensor, lambda x: x.to(low), ((input, *args), kwargs))
            with torch.autocast(device, enabled=False):
                return body(*args, **kwargs)

        composite(function)(step)
        return body

    return register


# One step, in torch --------------------------------------------------------------------------------------------------


@cell(torch.lstm_cell)
def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    hidden, cell = hx
    gates = F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


@cell(torch.gru_cell)
def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    input_r, input_z, input_n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    r, z = (input_r + hidden_r).sigmoid(), (input_z + hidden_z).sigmoid()
    n = (input_n + r * hidden_n).tanh()
    return n + z * (hx - n)


@cell(torch.rnn_tanh_cell)
def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).tanh()


@cell(torch.rnn_relu_cell)
def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).relu()


@composite(aten._thnn_fused_lstm_cell)
def fused_lstm_cell(input_gates, hidden_gates, cx, input_bias=None, hidden_bias=None):
    """What `torch.lstm_cell` runs on a GPU after its products; the third result is for the backward pass."""
    gates = _with_biases(input_gates, input_bias) + _with_biases(hidden_gates, hidden_bias)
    i, f, g, o = gates.chunk(4, -1)
    i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
    cell = f * cx + i * g
    return o * cell.tanh(), cell, torch.cat((i, f, g, o), -1)


@composite(aten._thnn_fused_gru_cell)
def fused_gru_cell(input_gates, hidden_gates, hx, input_bias=None, hidden_bias=None):
    """The same for `torch.gru_cell`."""
    input_r, input_z, input_n = _with_biases(input_gates, input_bias).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = _with_biases(hidden_gates, hidden_bias).chunk(3, -1)
    r, z = (input_r + hidden_r).sigmoid(), (input_z + hidden_z).sigmoid()
    n = (input_n + r * hidden_n).tanh()
    return n + z * (hx - n), torch.cat((r, z, n, hx, hidden_n), -1)


def _with_biases(gates, bias):
    return gates if bias is None else gates + bias


# A whole sequence, as TensorRT loops ---------------------------------------------------------------------------------


def recurrent(kind, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """`torch.<kind>` as one call that is recorded: torch itself would unroll it, which fixes the length."""
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    tensors = (input, *states, *params)
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    if has_torch_function(tensors):
        return handle_torch_function(recurrent, tensors, kind, input, hx, params, *options)
    if any(map(is_traced, tensors)):
        sizes = (*input.shape[:2], states[0].shape[2] * (2 if bidirectional else 1))
        output = input.new_empty(sizes, dtype=states[0].dtype)
        return output, *(state.new_empty(state.shape) for state in states)
    if len({t.dtype for t in tensors}) > 1:  # as under autocast, where torch unrolls the layer
        wide = [t.float() for t in tensors]
        hx = wide[1 : 1 + len(states)] if kind == "lstm" else wide[1]
        output, *last = getattr(torch, kind)(wide[0], hx, wide[1 + len(states) :], *options)
        return output.to(states[0].dtype), *(x.to(state.dtype) for x, state in zip(last, states, strict=True))
    return getattr(torch, kind)(input, hx, params, *options)


def _register(kind):
    @composite(getattr(torch, kind))
    def body(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        check(not isinstance(has_biases, (list, tuple)), PACKED)
        check(not (train and dropout and num_layers > 1), f"{dropout=} is random; call the model in eval mode")
        options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
        device = input.device.type
        if not torch.is_autocast_enabled(device):
            return recurrent(kind, input, hx, params, *options)
        hx, low = _as_autocast_returns(kind, input, hx, params, options)
        with torch.autocast(device, enabled=False):
            return recurrent(kind, input.to(low), hx, [p.to(low) for p in params], *options)


def _as_autocast_returns(kind, input, hx, params, options):
    """The states in the dtypes in which the layer returns them, and the dtype in which it computes.

    Both depend on the kernels that torch has for it. What is computed from the input and the weights is of autocast's
    dtype, and so are the products with the states; cuDNN's kernels are given float16 whatever autocast's dtype is. A
    state that torch leaves in float32 stays in it from step to step. One step of zeros on the device tells.
    """
    check(not any(map(is_traced, params)), CONSTANT)
    like = lambda x, *sizes: torch.zeros(sizes, dtype=x.dtype, device=x.device)  # noqa: E731
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    zeros = [like(x, x.shape[0], 1, x.shape[2]) for x in states]
    step = like(input, 1, 1, input.shape[2]), zeros if kind == "lstm" else zeros[0]
    output, *results = getattr(torch, kind)(*step, params, *options)
    low = output.dtype if output.is_cuda else torch.get_autocast_dtype(output.device.type)
    states = [x.to(result.dtype) for x, result in zip(states, results, strict=True)]
    return states if kind == "lstm" else states[0], low


for _kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _register(_kind)


@composite(torch.mkldnn_rnn_layer)
def one_direction(
    input,
    weight0,
    weight1,
    weight2,
    weight3,
    hx_,
    cx_,
    reverse,
    batch_sizes,
    mode,
    hidden_size,
    num_layers,
    has_biases,
    bidirectional,
    batch_first,
    train,
):
    """What `torch.lstm` runs on a CPU, once a layer and direction."""
    check(mode == 2 and num_layers == 1, f"{mode=}, {num_layers=}: it is known for one layer of an LSTM")
    check(not batch_sizes, PACKED)
    params = [weight0, weight1, weight2, weight3] if has_biases else [weight0, weight1]
    along = 1 if batch_first else 0
    x = input.flip(along) if reverse else input
    states = [state.reshape(1, *state.shape[-2:]) for state in (hx_, cx_)]
    output, hidden, cell = recurrent("lstm", x, states, params, has_biases, 1, 0.0, train, False, batch_first)
    output = output.flip(along) if reverse else output
    return output, hidden.reshape(hx_.shape), cell.reshape(cx_.shape), output.new_empty(0)


_MODES = ("rnn_relu", "rnn_tanh", "lstm", "gru")  # as cuDNN numbers them


@composite(torch._cudnn_rnn)
def all_layers(
    input,
    weight,
    weight_stride0,
    weight_buf,
    hx,
    cx,
    mode,
    hidden_size,
    proj_size,
    num_layers,
    batch_first,
    dropout,
    train,
    bidirectional,
    batch_sizes,
    dropout_state,
):
    """What `torch.lstm` and its kind run on a GPU: a layer and direction has two weights, two biases, a projection."""
    check(not batch_sizes, PACKED)
    states = hx if cx is None else [hx, cx]
    options = (weight_stride0 in (4, 5), num_layers, dropout, train, bidirectional, batch_first)
    check(not (train and dropout and num_layers > 1), f"{dropout=} is random; call the model in eval mode")
    output, hidden, *cell = recurrent(_MODES[mode], input, states, weight, *options)
    unused = output.new_empty(0)
    return output, hidden, cell[0] if cell else unused, unused, unused


@converter(recurrent, limits="constant weights")
def recurrent_layers(
    ctx: Context, kind, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):
    check(all(isinstance(p, torch.Tensor) for p in params), CONSTANT)
    steps = permute(ctx, input, [1, 0, 2]) if batch_first else materialize(ctx, input)
    states = list(hx) if isinstance(hx, (list, tuple)) else [hx]
    directions = 2 if bidirectional else 1
    size = len(params) // (num_layers * directions)
    weights = [params[i : i + size] for i in range(0, len(params), size)]
    finals = []
    for first in range(0, len(weights), directions):
        start = [part(ctx, state, first, directions) for state in states]
        steps, last = sweep(ctx, kind, steps, start, weights[first : first + directions], has_biases)
        finals.append(last)
    output = permute(ctx, steps, [1, 0, 2]) if batch_first else steps
    return output, *(concat(ctx, layers, 0) for layers in zip(*finals, strict=True))


def part(ctx: Context, x, first, count):
    return x[first : first + count] if isinstance(x, torch.Tensor) else narrow(ctx, x, 0, first, count)


def sweep(ctx: Context, kind, steps, start, weights, has_biases):
    """All steps of one layer by one loop, in which both directions are one batch of two; the rest is done before it."""
    length, batch, _ = dims(ctx, steps)
    network = ctx.network
    count = reshape(ctx, shape_tensor(ctx, [length]), ())
    inputs = [project(ctx, steps, kind, *own[:4] if has_biases else own[:2]) for own in weights]
    loop = network.add_loop()
    loop.add_trip_limit(count, trt.TripLimit.COUNT)
    pieces = [loop.add_iterator(x, 0, reverse=i == 1).get_output(0) for i, x in enumerate(inputs)]
    given = concat(ctx, [ctx.track(piece, dims(ctx, x)[1:]) for piece, x in zip(pieces, inputs, strict=True)], 0)
    start = [materialize(ctx, x) for x in start]
    recurrences = [loop.add_recurrence(x) for x in start]
    state = [ctx.track(r.get_output(0), dims(ctx, x)) for r, x in zip(recurrences, start, strict=True)]
    weight = lambda i: torch.stack([own[i] for own in weights]) if i < len(weights[0]) else None  # noqa: E731
    following = STEPS[kind](ctx, given, state, weight, has_biases)
    for recurrence, tensor in zip(recurrences, following, strict=True):
        recurrence.set_input(1, tensor)
    outputs = []
    for i in range(len(weights)):
        hidden = narrow(ctx, following[0], 0, i, 1)
        layer = loop.add_loop_output(hidden, trt.LoopOutput.REVERSE if i else trt.LoopOutput.CONCATENATE, 0)
        layer.set_input(1, count)
        outputs.append(ctx.track(layer.get_output(0), (length, *dims(ctx, hidden))))
    last = [loop.add_loop_output(tensor, trt.LoopOutput.LAST_VALUE).get_output(0) for tensor in state]
    last = [ctx.track(tensor, dims(ctx, x)) for tensor, x in zip(last, start, strict=True)]
    output = concat(ctx, outputs, -1)
    return reshape(ctx, output, (length, batch, dims(ctx, output)[-1])), last


def project(ctx: Context, steps, kind, w_ih, w_hh, b_ih=None, b_hh=None):
    """What the inputs of all steps add to the gates, with the biases; a unit axis stands for the direction."""
    result = hidden_product(ctx, steps, w_ih)
    if b_ih is not None:
        if kind == "gru":  # the last third of its hidden bias is multiplied by the reset gate
            b_hh = torch.cat([b_hh[: len(b_hh) // 3 * 2], torch.zeros_like(b_hh[len(b_hh) // 3 * 2 :])])
        result = add(ctx, result, b_ih + b_hh)
    length, *rest = dims(ctx, result)
    return reshape(ctx, result, (length, 1, *rest))


def gates(ctx: Context, x, count):
    """The last dimension in equal parts."""
    size = dims(ctx, x)[-1] // count
    return [narrow(ctx, x, -1, i * size, size) for i in range(count)]


def hidden_product(ctx: Context, hidden, weight):
    """The weight's dtype is autocast's where the state's is not."""
    return matmul(ctx, cast(ctx, hidden, weight.dtype), weight, transpose_b=True)


def lstm_step(ctx: Context, given, state, weight, has_biases):
    hidden, cell = state
    total = add(ctx, given, hidden_product(ctx, hidden, weight(1)))
    i, f, g, o = gates(ctx, total, 4)
    i, f, o = (activation(ctx, Kind.SIGMOID, gate) for gate in (i, f, o))
    new = mul(ctx, i, activation(ctx, Kind.TANH, g))
    cell = add(ctx, mul(ctx, f, cell), new)
    hidden = mul(ctx, o, activation(ctx, Kind.TANH, cell))
    projection = weight(4 if has_biases else 2)
    return [hidden if projection is None else hidden_product(ctx, hidden, projection), cell]


def gru_step(ctx: Context, given, state, weight, has_biases):
    """torch's reset gate multiplies what the hidden state adds to the new one, its bias included."""
    (hidden,) = state
    size = dims(ctx, hidden)[-1]
    total = hidden_product(ctx, hidden, weight(1))
    both = add(ctx, *(narrow(ctx, x, -1, 0, 2 * size) for x in (given, total)))
    r, z = gates(ctx, activation(ctx, Kind.SIGMOID, both), 2)
    given, total = (narrow(ctx, x, -1, 2 * size, size) for x in (given, total))
    if has_biases:
        total = add(ctx, total, weight(3)[:, None, 2 * size :])
    n = activation(ctx, Kind.TANH, add(ctx, given, mul(ctx, r, total)))
    return [add(ctx, n, mul(ctx, z, sub(ctx, hidden, n)))]


def rnn_step(kind):
    def step(ctx: Context, given, state, weight, has_biases):
        total = add(ctx, given, hidden_product(ctx, state[0], weight(1)))
        return [activation(ctx, kind, total)]

    return step


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_step(Kind.TANH), "rnn_relu": rnn_step(Kind.RELU)}
