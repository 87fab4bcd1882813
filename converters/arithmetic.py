from torch2rt.vocabulary import (
    cast,
    check,
    converter,
    dtype_of,
    elementwise,
    torch,
    trt,
    unary,
)

EW, Unary = trt.ElementWiseOperation, trt.UnaryOperation
Tensor = torch.Tensor


@converter(torch.add, Tensor.add)
def add(ctx, input, other, *, alpha=1):
    if alpha != 1:
        other = elementwise(ctx, EW.PROD, other, alpha)
    return elementwise(ctx, EW.SUM, input, other, ctx.out.dtype)


@converter(torch.sub, Tensor.sub, torch.subtract, Tensor.subtract)
def sub(ctx, input, other, *, alpha=1):
    if alpha != 1:
        other = elementwise(ctx, EW.PROD, other, alpha)
    return elementwise(ctx, EW.SUB, input, other, ctx.out.dtype)


@converter(torch.rsub)
def rsub(ctx, input, other, *, alpha=1):
    if alpha != 1:
        input = elementwise(ctx, EW.PROD, input, alpha)
    return elementwise(ctx, EW.SUB, other, input, ctx.out.dtype)


@converter(torch.mul, Tensor.mul, torch.multiply, Tensor.multiply)
def mul(ctx, input, other):
    return elementwise(ctx, EW.PROD, input, other, ctx.out.dtype)
