import torch.nn.functional as F

from torch2rt.vocabulary import converter, elementwise, materialize, matmul, trt

EW = trt.ElementWiseOperation


@converter(F.linear)
def linear(ctx, input, weight, bias=None):
    product = matmul(ctx, input, weight, transpose_b=True)
    return product if bias is None else elementwise(ctx, EW.SUM, product, bias)
