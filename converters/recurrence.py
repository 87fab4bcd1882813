import torch.nn.functional as F
from torch.overrides import handle_torch_function, has_torch_function

from torch2rt.vocabulary import (
    activation,
    check,
    composite,
    concat,
    converter,
    dims,
    elementwise,
    is_traced,
    materialize,
    matmul,
    narrow,
    permute,
    reshape,
    rewrite,
    shape_tensor,
    torch,
    trt,
)

EW, Kind = trt.ElementWiseOperation, trt.ActivationType
PACKED = "packed sequences have no fixed shape. Pass the padded tensor, and mask what lies beyond each length"

rewrite(PACKED, torch._VF._pack_padded_sequence, torch._VF._pad_packed_sequence)


def without_autocast(function):
    """`composite`, for a function that autocast knows as a whole."""

    def register(body):
        @composite(function)
        def checked(input, *args, **kwargs):
            check(not torch.is_autocast_enabled(input.device.type), "autocast of recurrent layers is not supported")
            return body(input, *args, **kwargs)

        return body

    return register


# One step, in torch --------------------------------------------------------------------------------------------------


@without_autocast(torch.lstm_cell)
def lstm_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    hidden, cell = hx
    gates = F.linear(input, w_ih, b_ih) + F.linear(hidden, w_hh, b_hh)
    i, f, g, o = gates.chunk(4, -1)
    cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
    return o.sigmoid() * cell.tanh(), cell


@without_autocast(torch.gru_cell)
def gru_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    input_r, input_z, input_n = F.linear(input, w_ih, b_ih).chunk(3, -1)
    hidden_r, hidden_z, hidden_n = F.linear(hx, w_hh, b_hh).chunk(3, -1)
    r, z = (input_r + hidden_r).sigmoid(), (input_z + hidden_z).sigmoid()
    n = (input_n + r * hidden_n).tanh()
    return n + z * (hx - n)


@without_autocast(torch.rnn_tanh_cell)
def rnn_tanh_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).tanh()


@without_autocast(torch.rnn_relu_cell)
def rnn_relu_cell(input, hx, w_ih, w_hh, b_ih=None, b_hh=None):
    return (F.linear(input, w_ih, b_ih) + F.linear(hx, w_hh, b_hh)).relu()


# A whole sequence, as TensorRT loops ---------------------------------------------------------------------------------


def recurrent(kind, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
    """`torch.<kind>` as one call that is recorded: torch itself would unroll it, which fixes the length."""
    states = [hx] if isinstance(hx, torch.Tensor) else list(hx)
    tensors = (input, *states, *params)
    options = (has_biases, num_layers, dropout, train, bidirectional, batch_first)
    if has_torch_function(tensors):
        return handle_torch_function(recurrent, tensors, kind, input, hx, params, *options)
    if any(map(is_traced, tensors)):
        output = input.new_empty((*input.shape[:2], states[0].shape[2] * (2 if bidirectional else 1)))
        return output, *(input.new_empty(state.shape) for state in states)
    return getattr(torch, kind)(input, hx, params, *options)


def _register(kind):
    @without_autocast(getattr(torch, kind))
    def body(input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first):
        check(not isinstance(has_biases, (list, tuple)), PACKED)
        check(not (train and dropout and num_layers > 1), f"{dropout=} is random; call the model in eval mode")
        return recurrent(kind, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)


for _kind in ("lstm", "gru", "rnn_tanh", "rnn_relu"):
    _register(_kind)


@converter(recurrent)
def recurrent_layers(
    ctx, kind, input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first
):  # fmt: skip
    check(all(isinstance(p, torch.Tensor) for p in params), "the weights of a recurrent layer must be constant")
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


def part(ctx, x, first, count):
    return x[first : first + count] if isinstance(x, torch.Tensor) else narrow(ctx, x, 0, first, count)


def sweep(ctx, kind, steps, start, weights, has_biases):
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


def project(ctx, steps, kind, w_ih, w_hh, b_ih=None, b_hh=None):
    """What the inputs of all steps add to the gates, with the biases; a unit axis stands for the direction."""
    result = matmul(ctx, steps, w_ih, transpose_b=True)
    if b_ih is not None:
        if kind == "gru":  # the last third of its hidden bias is multiplied by the reset gate
            b_hh = torch.cat([b_hh[: len(b_hh) // 3 * 2], torch.zeros_like(b_hh[len(b_hh) // 3 * 2 :])])
        result = elementwise(ctx, EW.SUM, result, b_ih + b_hh)
    length, *rest = dims(ctx, result)
    return reshape(ctx, result, (length, 1, *rest))


def gates(ctx, x, count):
    """The last dimension in equal parts."""
    size = dims(ctx, x)[-1] // count
    return [narrow(ctx, x, -1, i * size, size) for i in range(count)]


def lstm_step(ctx, given, state, weight, has_biases):
    hidden, cell = state
    total = elementwise(ctx, EW.SUM, given, matmul(ctx, hidden, weight(1), transpose_b=True))
    i, f, g, o = gates(ctx, total, 4)
    i, f, o = (activation(ctx, Kind.SIGMOID, gate) for gate in (i, f, o))
    new = elementwise(ctx, EW.PROD, i, activation(ctx, Kind.TANH, g))
    cell = elementwise(ctx, EW.SUM, elementwise(ctx, EW.PROD, f, cell), new)
    hidden = elementwise(ctx, EW.PROD, o, activation(ctx, Kind.TANH, cell))
    projection = weight(4 if has_biases else 2)
    return [hidden if projection is None else matmul(ctx, hidden, projection, transpose_b=True), cell]


def gru_step(ctx, given, state, weight, has_biases):
    """torch's reset gate multiplies what the hidden state adds to the new one, its bias included."""
    (hidden,) = state
    size = dims(ctx, hidden)[-1]
    total = matmul(ctx, hidden, weight(1), transpose_b=True)
    both = elementwise(ctx, EW.SUM, *(narrow(ctx, x, -1, 0, 2 * size) for x in (given, total)))
    r, z = gates(ctx, activation(ctx, Kind.SIGMOID, both), 2)
    given, total = (narrow(ctx, x, -1, 2 * size, size) for x in (given, total))
    if has_biases:
        total = elementwise(ctx, EW.SUM, total, weight(3)[:, None, 2 * size :])
    n = activation(ctx, Kind.TANH, elementwise(ctx, EW.SUM, given, elementwise(ctx, EW.PROD, r, total)))
    return [elementwise(ctx, EW.SUM, n, elementwise(ctx, EW.PROD, z, elementwise(ctx, EW.SUB, hidden, n)))]


def rnn_step(kind):
    def step(ctx, given, state, weight, has_biases):
        total = elementwise(ctx, EW.SUM, given, matmul(ctx, state[0], weight(1), transpose_b=True))
        return [activation(ctx, kind, total)]

    return step


STEPS = {"lstm": lstm_step, "gru": gru_step, "rnn_tanh": rnn_step(Kind.TANH), "rnn_relu": rnn_step(Kind.RELU)}
