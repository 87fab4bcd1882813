"""Calls that TensorRT has nothing for, and what to write instead."""

from torch2rt.vocabulary import rewrite, torch

Tensor = torch.Tensor

rewrite(
    "TensorRT has no matrix decompositions. Compute it outside the module and pass the result as an input or a buffer; "
    "systems of up to 16 equations are solved: torch.linalg.solve, inv, det, slogdet and cholesky",
    *(
        getattr(torch.linalg, name)
        for name in """
            svd svdvals eig eigh eigvals eigvalsh qr lu lu_factor lu_factor_ex lu_solve ldl_factor
            ldl_factor_ex ldl_solve pinv lstsq matrix_rank matrix_exp cond householder_product
        """.split()
    ),
    torch.svd,
    torch.qr,
    torch.pinverse,
    torch.lu,
    torch.lu_solve,
    torch.lu_unpack,
    torch.geqrf,
    torch.ormqr,
    torch.matrix_exp,
    Tensor.svd,
    Tensor.qr,
    Tensor.pinverse,
    Tensor.lu,
    Tensor.lu_solve,
    Tensor.geqrf,
    Tensor.ormqr,
    Tensor.matrix_exp,
)
rewrite(
    "An engine draws no random numbers. Pass the noise to the module as an input",
    torch.bernoulli,
    torch.multinomial,
    torch.normal,
    torch.poisson,
    torch.rand_like,
    torch.randn_like,
    torch.randint_like,
    torch.rand,
    torch.randn,
    torch.randint,
    torch.randperm,
    Tensor.bernoulli,
    Tensor.bernoulli_,
    Tensor.multinomial,
    Tensor.normal_,
    Tensor.uniform_,
    Tensor.random_,
    Tensor.exponential_,
)
rewrite(
    "Its result has as many elements as the data says. Keep all elements and use torch.where or a mask",
    torch.nonzero,
    torch.argwhere,
    torch.masked_select,
    torch.unique,
    torch.unique_consecutive,
    torch.bincount,
    Tensor.nonzero,
    Tensor.argwhere,
    Tensor.masked_select,
    Tensor.unique,
    Tensor.unique_consecutive,
    Tensor.bincount,
)
rewrite("An engine has no access to the bits of a number", torch.nextafter, Tensor.nextafter)
