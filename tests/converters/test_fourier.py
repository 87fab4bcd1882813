import pytest
import torch
import torch.nn.functional as F
from harness import B, Call, S, case, check_case, ints, parametrize
from test_complex import one
from torch import nn

from torch2rt import ConversionError, UnsupportedError, torch2rt

fft, view_as_real = torch.fft, torch.view_as_real

TRANSFORMS = [
    *[
        one(lambda a, f=f: [f(a), f(a, n=3, dim=1, norm="ortho"), f(a, 7, -1, "forward")], id=f.__name__)
        for f in (fft.fft, fft.ifft, fft.irfft, fft.hfft)
    ],
    *[
        one(lambda a, f=f: [f(a.real), f(a.real, n=3, dim=1, norm="ortho"), f(a.imag, 7, -1, "forward")], id=f.__name__)
        for f in (fft.fft, fft.ifft, fft.rfft, fft.ihfft)
    ],
    *[
        one(lambda a, f=f: [f(a), f(a, s=(5, 3), norm="ortho"), f(a, dim=(2, 1), norm="forward")], id=f.__name__)
        for f in (fft.fft2, fft.ifft2, fft.irfft2, fft.hfft2)
    ],
    *[
        one(lambda a, f=f: [f(a.real), f(a.real, s=(5, 3), norm="ortho"), f(a.imag, dim=(2, 1))], id=f.__name__)
        for f in (fft.fft2, fft.rfft2, fft.ihfft2)
    ],
    *[
        one(lambda a, f=f: [f(a, dim=(1, 2)), f(a, s=(2, 5), dim=(1, -1), norm="ortho")], id=f.__name__)
        for f in (fft.fftn, fft.ifftn, fft.irfftn, fft.hfftn)
    ],
    *[
        one(lambda a, f=f: f(a.real, dim=(2, 1, 0)), (3, 4, 10), id=f.__name__, modes=("static",))
        for f in (fft.fftn, fft.rfftn, fft.ihfftn)
    ],
    case(lambda x: view_as_real(fft.fft(x)), [(S,)], id="1-d"),
    case(lambda x: view_as_real(fft.rfft(x)), [ints(B, 6)], id="ints"),
    case(lambda x: fft.fft(fft.fft(x, dim=-1), dim=-2).real, [(B, S, 6)], id="nested"),
    case(lambda x: fft.irfft(fft.rfft(x, norm="ortho"), n=x.shape[-1], norm="ortho"), [(B, S)], id="dynamic-there"),
    case(lambda x: fft.irfft(fft.rfft(x)), [(B, 3, S)], id="dynamic-even"),
    case(lambda x: view_as_real(fft.ifft(torch.complex(x, x * x), dim=1, norm="forward")), [(B, S, 3)], id="dynamic"),
    case(lambda x: fft.rfft(x).abs() * fft.rfftfreq(x.shape[-1], 0.5, device=x.device), [(B, S)], id="rfftfreq"),
    case(lambda x: fft.fft(x).abs() * fft.fftfreq(x.shape[-1], device=x.device), [(B, S)], id="fftfreq"),
    case(lambda x: fft.irfft(fft.rfft(x, n=2 * x.shape[-1]) ** 2)[..., : x.shape[-1]], [(B, S)], id="convolved"),
]


@parametrize(TRANSFORMS)
def test_transforms(row, mode, device):
    check_case(row, mode, device)


@pytest.mark.parametrize("n", [1, 2, 1000, 2049, 4096, 6561, 10007 * 2, 65536])
def test_accuracy(n, device):
    """To 1e-5 of the largest element, and twice that on a GPU; 20014 has no factors that fit."""

    def function(x):
        spectrum = fft.rfft(x)
        return view_as_real(spectrum), view_as_real(fft.fft(x)[..., : n // 2 + 1]), fft.irfft(spectrum, n=n)

    x = torch.randn(3, n, device=device)
    if n == 20014:
        with pytest.raises(UnsupportedError, match="a transform of 20014 elements needs a matrix of 10007 rows"):
            torch2rt(Call(function), [x])
        return
    model_trt = torch2rt(Call(function), [x])
    run = model_trt if device.type == "cuda" else model_trt.reference()
    for ours, theirs in zip(run(x), function(x), strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < (2e-5 if x.is_cuda else 1e-5) * theirs.abs().max()


def spectrogram(x, n_fft=16, window=None, **kwargs):
    window = torch.hann_window(window, device=x.device) if window else None
    return torch.stft(x, n_fft, window=window, **kwargs)


def there_and_back(x, n_fft=16, window=None, length=None, **kwargs):
    window = torch.hann_window(window, device=x.device) if window else None
    z = torch.stft(x, n_fft, window=window, return_complex=True, **kwargs)
    return torch.istft(z, n_fft, window=window, length=length, **{k: v for k, v in kwargs.items() if k != "pad_mode"})


T = S * 10
SHORT_TIME = [
    case(lambda x: spectrogram(x, window=16, return_complex=True).abs() ** 2, [(B, T)], id="power"),
    case(
        lambda x: view_as_real(spectrogram(x, window=12, win_length=12, hop_length=5, return_complex=True)),
        [(B, T)],
        id="window",
    ),
    case(
        lambda x: spectrogram(x, window=16, center=False, normalized=True, return_complex=True).abs(),
        [(B, T)],
        id="normalized",
    ),
    case(
        lambda x: spectrogram(x, pad_mode="constant", onesided=False, return_complex=True).angle().cos(),
        [(B, T)],
        id="onesided",
    ),
    case(lambda x: spectrogram(x, win_length=9, return_complex=False), [(T,)], id="real"),
    case(lambda x: view_as_real(spectrogram(torch.complex(x, -x), return_complex=True)), [(B, T)], id="of-complex"),
    case(lambda x: x.stft(16, 3, return_complex=True).abs(), [(B, T)], id="method"),
    case(there_and_back, [(B, T)], window=16),
    case(there_and_back, [(T,)], window=12, win_length=12, hop_length=3, normalized=True),
    case(there_and_back, [(B, T)], hop_length=5, center=False),
    case(there_and_back, [(B, T)], window=16, onesided=False, length=60),
    case(there_and_back, [(B, T)], hop_length=5, length=30),
    case(
        lambda x: view_as_real(
            torch.istft(
                spectrogram(torch.complex(x, x * x), window=16, return_complex=True),
                16,
                window=torch.hann_window(16, device=x.device),
                return_complex=True,
            )
        ),
        [(B, T)],
        id="istft-of-complex",
    ),
]


@parametrize(SHORT_TIME)
@pytest.mark.filterwarnings("ignore:.*window was not provided", "ignore:stft with return_complex=False")
@pytest.mark.filterwarnings("ignore:The length of signal is shorter")
def test_short_time(row, mode, device):
    check_case(row, mode, device)


# Models --------------------------------------------------------------------------------------------------------------


class FNet(nn.Module):
    def __init__(self, width=12):
        super().__init__()
        self.mixed, self.normal = nn.LayerNorm(width), nn.LayerNorm(width)
        self.forwards = nn.Sequential(nn.Linear(width, 24), nn.GELU(), nn.Linear(24, width))

    def forward(self, x):
        x = self.mixed(x + fft.fftn(x, dim=(1, 2)).real)
        return self.normal(x + self.forwards(x))


class FourierUnit(nn.Module):
    """The spectral transform of LaMa."""

    def __init__(self, channels=3, maps=5):
        super().__init__()
        self.conv = nn.Conv2d(channels * 2, maps * 2, 1, bias=False)
        self.bn = nn.BatchNorm2d(maps * 2)

    def forward(self, x):
        z = fft.rfftn(x, dim=(-2, -1), norm="ortho")
        z = torch.stack((z.real, z.imag), dim=-1).permute(0, 1, 4, 2, 3).contiguous()
        z = F.relu(self.bn(self.conv(z.view(x.shape[0], -1, *z.shape[3:]))))
        z = z.view(x.shape[0], -1, 2, *z.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        return fft.irfftn(torch.complex(z[..., 0], z[..., 1]), s=x.shape[-2:], dim=(-2, -1), norm="ortho")


class GlobalFilter(nn.Module):
    """Of GFNet: a product with learned complex numbers."""

    def __init__(self, size=8, width=6):
        super().__init__()
        self.size, self.complex_weight = size, nn.Parameter(torch.randn(size, size // 2 + 1, width, 2))

    def forward(self, x):
        batch, _, width = x.shape
        z = fft.rfft2(x.view(batch, self.size, self.size, width), dim=(1, 2), norm="ortho")
        z = z * torch.view_as_complex(self.complex_weight)
        return fft.irfft2(z, s=(self.size, self.size), dim=(1, 2), norm="ortho").reshape(x.shape)


class SpectralConv(nn.Module):
    """Of a Fourier neural operator: low frequencies mixed, in place, the others zero."""

    def __init__(self, channels=3, maps=4, modes=3):
        super().__init__()
        self.low, self.high = (
            nn.Parameter(torch.rand(channels, maps, modes, modes, dtype=torch.complex64)) for _ in range(2)
        )
        self.maps, self.modes = maps, modes

    def forward(self, x):
        batch, _, height, width = x.shape
        z, m = fft.rfft2(x), self.modes
        out = torch.zeros(batch, self.maps, height, width // 2 + 1, dtype=torch.complex64, device=x.device)
        out[:, :, :m, :m] = torch.einsum("bixy,ioxy->boxy", z[:, :, :m, :m], self.low)
        out[:, :, -m:, :m] = torch.einsum("bixy,ioxy->boxy", z[:, :, -m:, :m], self.high)
        return fft.irfft2(out, s=(height, width))


class LogMel(nn.Module):
    def __init__(self, n_fft=64, bands=10):
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(50))
        self.register_buffer("bands", torch.rand(bands, n_fft // 2 + 1))

    def forward(self, x):
        z = torch.stft(x, self.n_fft, 20, 50, self.window, return_complex=True)
        return torch.log10((self.bands @ z.abs() ** 2).clamp(min=1e-10))


MODELS = [
    case(FNet(), [(B, S, 12)], id="fnet"),
    case(FourierUnit(), [(B, 3, 8, 10)], id="lama"),
    case(FourierUnit(), [(B, 3, S, S * 2)], id="lama-dynamic"),
    case(GlobalFilter(), [(B, 64, 6)], id="gfnet"),
    case(SpectralConv(), [(B, 3, 8, 10)], id="fno"),
    case(LogMel(), [(B, S * 40)], id="logmel"),
]


@parametrize(MODELS)
def test_models(row, mode, device):
    check_case(row, mode, device)


# Refused -------------------------------------------------------------------------------------------------------------

REFUSED = [
    (lambda x: spectrogram(x, 4, center=False, align_to_window=True, return_complex=True), "align_to_window=True"),
    (lambda x: spectrogram(x, 4, window=3, return_complex=True), "the window is not of 4 elements"),
    (lambda x: there_and_back(x, 4, 4, hop_length=4), "the windows leave a gap"),
    (lambda x: torch.istft(x[None], 4), "its input is no such spectrum"),
]


@pytest.mark.parametrize(("function", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_refused(function, message):
    with pytest.raises(ConversionError, match=message):
        torch2rt(Call(function), [torch.randn(2, 8)])


def test_a_dynamic_length_has_a_bound():
    with pytest.raises(UnsupportedError, match="a transform of dynamic length has at most 4096 elements"):
        torch2rt(Call(lambda x: fft.fft(x).real), [torch.randn(2, 8)], max_shapes=[(2, 5000)])
