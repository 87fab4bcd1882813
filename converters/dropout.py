import torch.nn.functional as F

from torch2rt.vocabulary import Context, check, converter, torch

RANDOM = (
    "it drops elements at random in training mode; call .eval() on the module. Where the module's own Python calls it, "
    "pass training=self.training: training=True is the default of F.dropout"
)


@converter(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, limits="inference only")
def dropout(ctx: Context, input, p=0.5, training=True, inplace=False):
    check(not training or p == 0, RANDOM)
    return input


@converter(F.alpha_dropout, F.feature_alpha_dropout, limits="inference only")
def alpha_dropout(ctx: Context, input, p=0.5, training=False, inplace=False):
    check(not training or p == 0, RANDOM)
    return input


@converter(
    torch.dropout, torch.alpha_dropout, torch.feature_dropout, torch.feature_alpha_dropout, limits="inference only"
)
def dropout_op(ctx: Context, input, p, train):
    check(not train or p == 0, RANDOM)
    return input
