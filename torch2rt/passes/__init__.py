"""Passes: what changes a traced graph before it is lowered. Each takes a `torch.fx.GraphModule` and returns one.

`default()` lists the passes that `torch2rt()` and `lower()` run. A pass of your own is a function; it leaves the graph
that it is given as it is, and returns that one or a changed copy. What a graph must keep to is written in
`torch2rt.graph`. Here, one that multiplies by constants instead of dividing by them:

    import torch
    from torch2rt import passes, torch2rt

    def reciprocals(graph):
        graph = passes.copy_graph(graph)
        for node in graph.graph.find_nodes(op="call_function", target=torch.Tensor.div):
            x, divisor = node.args
            if isinstance(divisor, torch.fx.Node) and (value := passes.constant_of(graph, divisor)) is not None:
                node.target = torch.Tensor.mul
                node.args = (x, passes.add_constant(graph, "reciprocal", 1 / value, before=node))
        return passes.finish(graph)

    model_trt = torch2rt(model, [x], passes=[*passes.default(), reciprocals])
"""

from torch2rt.passes.copies import add_constant as add_constant
from torch2rt.passes.copies import constant_of as constant_of
from torch2rt.passes.copies import copy_graph as copy_graph
from torch2rt.passes.copies import finish as finish
from torch2rt.passes.order import Pass as Pass
from torch2rt.passes.order import chosen as chosen
from torch2rt.passes.order import default as default
from torch2rt.passes.order import run as run
