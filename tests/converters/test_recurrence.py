import pytest
import torch
from harness import B, Data, S, With, case, check_case, compare, half, parametrize
from torch.nn import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell

from torch2rt import TraceError, UnsupportedError, lower, torch2rt, trace
from torch2rt.runtime.module import ReferenceModule

aten = torch.ops.aten


def started(module, *states):
    """A layer that is given its initial state."""
    call = lambda m, x, *s: m(x, s if len(s) > 1 else s[0])  # noqa: E731
    name = f"{type(module).__name__}-started" + "-reverse" * module.bidirectional + "-batch_first" * module.batch_first
    return case(With(module, call), [(S, B, 3) if not module.batch_first else (B, S, 3), *states], id=name)


def unrolled(cell, read=lambda state: state):
    """A cell in a Python loop."""

    def call(cell, x):
        state, outputs = None, []
        for step in x.unbind(0):
            state = cell(step, state)
            outputs.append(read(state))
        return torch.stack(outputs), state

    return case(With(cell, call), [(5, B, 3)], id=f"{type(cell).__name__}-unrolled")


class Decoder(torch.nn.Module):
    """A recurrent layer, and behind it what neural audio codecs put there."""

    def __init__(self, activation):
        super().__init__()
        self.rnn, self.activation = LSTM(8, 8), activation
        self.up = torch.nn.ConvTranspose1d(8, 8, 4, 2)
        self.down, self.back = torch.nn.Conv1d(8, 4, 3, padding=1), torch.nn.Conv1d(4, 8, 1)

    def forward(self, x):
        x = self.up(self.activation(self.rnn(x.permute(2, 0, 1))[0].permute(1, 2, 0)))
        return self.activation(x + self.back(self.activation(self.down(self.activation(x)))))


def one_direction(reverse):
    """The operator that `torch.lstm` runs on a CPU."""
    module = LSTM(3, 4)
    weights = [p.detach() for p in module.parameters()]

    def call(x, hidden, cell):
        return torch.mkldnn_rnn_layer(x, *weights, hidden, cell, reverse, [], 2, 4, 1, True, False, False, False)[:3]

    return call


def under_autocast(module):
    def call(rnn, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return rnn(x)

    return With(module, call)


CASES = [
    *[
        case(Decoder(activation), [(B, 8, S)], id=f"decoder-{type(activation).__name__}", modes=("dynamic",))
        for activation in (torch.nn.ELU(), torch.nn.CELU(0.7), torch.nn.Hardsigmoid(), torch.nn.Softplus(2.0))
    ],
    case(LSTM(3, 4), [(S, B, 3)], id="LSTM"),
    case(LSTM(3, 4), [(5, B, 3)], id="LSTM-static-length"),
    case(LSTM(3, 4, 2, bidirectional=True, batch_first=True), [(B, S, 3)], id="LSTM-2-reverse-batch_first"),
    case(LSTM(3, 4, bias=False), [(S, 2, 3)], id="LSTM-no-bias"),
    case(LSTM(3, 5, 2, proj_size=2), [(S, B, 3)], id="LSTM-proj"),
    case(LSTM(3, 5, bidirectional=True, proj_size=2, bias=False), [(S, B, 3)], id="LSTM-proj-reverse-no-bias"),
    case(LSTM(3, 4, 2, dropout=0.5), [(S, B, 3)], id="LSTM-dropout-eval"),
    case(LSTM(3, 8), [(S, 3)], id="LSTM-unbatched"),
    case(LSTM(3, 4, bidirectional=True).half(), [half(S, B, 3)], id="LSTM-half"),
    case(GRU(3, 4).bfloat16(), [Data((S, B, 3), torch.bfloat16)], id="GRU-bfloat16"),
    case(GRU(3, 4), [(S, B, 3)], id="GRU"),
    case(GRU(3, 4, 3, bidirectional=True), [(S, B, 3)], id="GRU-3-reverse"),
    case(GRU(3, 4, bias=False, batch_first=True), [(B, S, 3)], id="GRU-no-bias-batch_first"),
    case(GRU(3, 8, bidirectional=True), [(S, 3)], id="GRU-unbatched"),  # TensorRT needs minutes for hidden size 4
    case(RNN(3, 4, 2), [(S, B, 3)], id="RNN"),
    case(RNN(3, 4, nonlinearity="relu", bidirectional=True, bias=False), [(S, B, 3)], id="RNN-relu-reverse"),
    started(LSTM(3, 4, 2, bidirectional=True), (4, B, 4), (4, B, 4)),
    started(LSTM(3, 4, batch_first=True, proj_size=2), (1, B, 2), (1, B, 4)),
    started(GRU(3, 4, 2), (2, B, 4)),
    started(RNN(3, 4, batch_first=True, bidirectional=True), (2, B, 4)),
    case(With(LSTM(3, 4), lambda m, x: m(x)[1][0][-1]), [(S, B, 3)], id="LSTM-only-the-last"),
    case(With(LSTM(3, 4), lambda m, x: m(x * 2)[0].relu()), [(S, B, 3)], id="LSTM-only-the-output"),
    case(With(LSTM(4, 4), lambda m, x: m(*m(x))[0]), [(S, B, 4)], id="LSTM-twice"),
    case(
        With(LSTM(3, 4), lambda m, x: m(x.flip(0), (x[:1, :, :1].repeat(1, 1, 4),) * 2)),
        [(S, B, 3)],
        id="LSTM-computed-state",
    ),
    case(LSTMCell(3, 4), [(B, 3)], id="LSTMCell"),
    case(With(LSTMCell(3, 4), lambda m, x, h, c: m(x, (h, c))), [(B, 3), (B, 4), (B, 4)], id="LSTMCell-started"),
    case(LSTMCell(3, 4, bias=False), [(3,)], id="LSTMCell-unbatched"),
    case(GRUCell(3, 4), [(B, 3), (B, 4)], id="GRUCell"),
    case(GRUCell(3, 4, bias=False).half(), [half(3), half(4)], id="GRUCell-unbatched-half"),
    case(RNNCell(3, 4), [(B, 3), (B, 4)], id="RNNCell"),
    case(RNNCell(3, 4, nonlinearity="relu"), [(B, 3)], id="RNNCell-relu"),
    case(one_direction(False), [(S, B, 3), (1, B, 4), (1, B, 4)], id="mkldnn_rnn_layer"),
    case(one_direction(True), [(S, B, 3), (1, B, 4), (1, B, 4)], id="mkldnn_rnn_layer-reverse"),
    unrolled(LSTMCell(3, 4), lambda state: state[0]),
    unrolled(GRUCell(3, 4)),
]


@parametrize(CASES)
def test_recurrence(row, mode, device):
    check_case(row, mode, device)


def test_one_loop_for_both_directions(device):
    network = lower(trace(LSTM(3, 4, 2, bidirectional=True), [torch.randn(5, 2, 3)])).definition
    types = [network.get_layer(i).type.name for i in range(network.num_layers)]
    assert types.count("TRIP_LIMIT") == 2 and types.count("ITERATOR") == 4
    inside = types[types.index("TRIP_LIMIT") : types.index("LOOP_OUTPUT")]
    assert inside.count("MATRIX_MULTIPLY") == 1


def test_dropout_between_layers_is_refused():
    class Trains(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = LSTM(3, 4, 2, dropout=0.5)

        def forward(self, x):
            return self.rnn.train()(x)[0]

    with pytest.raises((TraceError, UnsupportedError), match=r"dropout=0\.5 is random"):
        torch2rt(Trains(), [torch.randn(5, 2, 3)])


AUTOCAST = [
    case(under_autocast(module), [shape], id=f"autocast-{name}", rtol=2e-2, atol=2e-2)
    for name, module, shape in (
        ("LSTM", LSTM(3, 4, 2, bidirectional=True), (S, B, 3)),
        ("LSTM-no-bias", LSTM(3, 4, bias=False, batch_first=True), (B, S, 3)),
        ("LSTM-proj", LSTM(3, 4, proj_size=2), (S, B, 3)),
        ("GRU", GRU(3, 4, 2, bidirectional=True), (S, B, 3)),
        ("RNN", RNN(3, 4), (S, B, 3)),
        ("LSTMCell", LSTMCell(3, 4), (B, 3)),
        ("GRUCell", GRUCell(3, 4), (B, 3)),
        ("RNNCell", RNNCell(3, 4), (B, 3)),
    )
]


@parametrize(AUTOCAST)
def test_autocast(row, mode, device):
    layer = LSTM(3, 4).to(device)
    try:
        with torch.autocast(device.type, torch.bfloat16):
            layer(torch.ones(2, 2, 3, device=device))
    except RuntimeError as error:
        pytest.skip(f"torch itself has no kernel here: {error}")
    check_case(row, mode, device)


FUSED = {
    "lstm": (aten._thnn_fused_lstm_cell.default, torch.lstm_cell, 4),
    "gru": (aten._thnn_fused_gru_cell.default, torch.gru_cell, 3),
}


@pytest.mark.parametrize("biases", [0, 2])
@pytest.mark.parametrize("kind", FUSED)
def test_what_is_left_of_cells_on_a_gpu_after_their_products(kind, biases, device):
    """torch has kernels for these on GPUs alone, so the cells themselves say what is right."""
    fused, whole, gates = FUSED[kind]
    weights = [torch.randn(4 * gates, size, device=device) for size in (3, 4)]
    given = [torch.randn(4 * gates, device=device) for _ in range(biases)]
    x, h, c = (torch.randn(2, size, device=device) for size in (3, 4, 4))
    state = (h, c) if kind == "lstm" else h

    def call(m, x):
        return fused(x @ weights[0].T, h @ weights[1].T, c if kind == "lstm" else h, *given)[:-1]

    network = lower(trace(With(torch.nn.Identity(), call), [x]))
    result = whole(x, state, *weights, *given)
    compare(ReferenceModule(network)(x), result if kind == "lstm" else (result,), 1e-5, 1e-5)


def test_packed_sequences_are_refused():
    def call(rnn, x, lengths):
        packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths.cpu(), enforce_sorted=False)
        return rnn(packed)[1]

    for lengths in (lambda x: torch.tensor([3, 5]), lambda x: x[0, :, 0].long()):
        with pytest.raises((TraceError, UnsupportedError), match="padded"):
            torch2rt(With(GRU(3, 4), lambda m, x: call(m, x, lengths(x))), [torch.randn(5, 2, 3)])  # noqa: B023
