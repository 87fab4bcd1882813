"""Calls that TensorRT has nothing for, and what to write instead."""

from torch2rt.vocabulary import rewrite, torch

Tensor = torch.Tensor

rewrite(
    "TensorRT has no complex numbers. Multiply real and imaginary parts, or a DFT matrix, as real tensors",
    *(f for name, f in vars(torch.fft).items() if callable(f) and not name.startswith("_")),
    torch.stft, torch.istft, Tensor.stft, Tensor.istft, torch.view_as_complex, torch.complex, torch.polar,
)  # fmt: skip
rewrite(
    "TensorRT has no matrix decompositions. Compute it outside the module and pass the result as an input or a buffer",
    *(
        getattr(torch.linalg, name)
        for name in ("svd", "svdvals", "eig", "eigh", "eigvals", "eigvalsh", "qr", "lu", "lu_factor", "cholesky",
                     "inv", "pinv", "solve", "solve_triangular", "lstsq", "det", "slogdet",
                     "matrix_rank", "matrix_exp")
    ),
    torch.svd, torch.qr, torch.inverse, torch.pinverse, torch.det, torch.logdet, torch.slogdet, torch.cholesky,
    Tensor.svd, Tensor.qr, Tensor.inverse, Tensor.pinverse, Tensor.det, Tensor.logdet, Tensor.slogdet, Tensor.cholesky,
)  # fmt: skip
rewrite(
    "An engine draws no random numbers. Pass the noise to the module as an input",
    torch.bernoulli, torch.multinomial, torch.normal, torch.poisson, torch.rand_like, torch.randn_like,
    torch.randint_like, torch.rand, torch.randn, torch.randint, torch.randperm, Tensor.bernoulli, Tensor.bernoulli_,
    Tensor.multinomial, Tensor.normal_, Tensor.uniform_, Tensor.random_, Tensor.exponential_,
)  # fmt: skip
rewrite(
    "Its result has as many elements as the data says. Keep all elements and use torch.where or a mask",
    torch.nonzero, torch.argwhere, torch.masked_select, torch.unique, torch.unique_consecutive, torch.bincount,
    Tensor.nonzero, Tensor.argwhere, Tensor.masked_select, Tensor.unique, Tensor.unique_consecutive, Tensor.bincount,
)  # fmt: skip
