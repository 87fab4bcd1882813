"""An engine built again of the graph that was saved with it, by the TensorRT that is here."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from torch2rt.engine import engine_cache
from torch2rt.engine.build import build
from torch2rt.engine.engine import Engine
from torch2rt.engine.joined import joined
from torch2rt.engine.source import Decoded, decode, getattr_of, is_value, name_of, needed_nodes
from torch2rt.errors import ConversionError, EngineError
from torch2rt.graph_key import content
from torch2rt.interface import Interface
from torch2rt.lowering import lower
from torch2rt.network import Network
from torch2rt.passes.copies import add_constant, copy_graph, finish, to_be_kept
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.saved import Source
from torch2rt.tracing.trace import trace


def network_of(nodes: Sequence[Any], tensors: Sequence[torch.Tensor], interface: Interface, nan: str) -> Network:
    """The network of a graph that was saved; raises `EngineError` where it cannot be made here."""
    reason: Exception | None = None
    # A graph that was traced on the CPU may ask for strides that only the CPU's kernels give.
    for device in map(torch.device, ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]):
        decoded = decode(nodes, tensors, device)
        try:
            network = _lowered(decoded, device, interface, nan)
        except (ConversionError, RuntimeError, ValueError) as error:
            reason = reason or error
        else:
            network.interface = interface
            return network
    raise EngineError(f"The engine cannot be built again of its graph: {reason}") from reason


def _lowered(decoded: Decoded, device: torch.device, interface: Interface, nan: str) -> Network:
    specs = interface.inputs
    examples = [
        torch.zeros(spec.opt, dtype=spec.dtype, device=device).contiguous(memory_format=spec.memory_format)
        for spec in specs
    ]
    graph = trace(
        decoded.graph,
        examples,
        input_names=[spec.name for spec in specs],
        output_names=list(interface.outputs),
        min_shapes=[spec.min for spec in specs],
        opt_shapes=[spec.opt for spec in specs],
        max_shapes=[spec.max for spec in specs],
    )
    graph = _unfolded(graph, decoded)
    _name_places(graph, decoded)
    network = lower(graph, nan=nan, passes=[])
    network.keep_graphs(*to_be_kept(graph, graph))
    return network


def _unfolded(graph: torch.fx.GraphModule, decoded: Decoded) -> torch.fx.GraphModule:
    """The graph with calls of constants in the place of their results, where the engine needs the calls."""
    if not decoded.kept:
        return graph
    graph = copy_graph(graph)
    for node in graph.graph.find_nodes(op="get_attr"):
        function, args = decoded.kept.get(str(node.target), (None, []))
        if function is None:
            continue
        value, first = getattr_of(graph, node), next(iter(node.users))
        given = [
            add_constant(graph, f"{node.target}_{place}", arg, before=first) if isinstance(arg, torch.Tensor) else arg
            for place, arg in enumerate(args)
        ]
        with graph.graph.inserting_before(first):
            call = graph.graph.call_function(function, tuple(given))
        like = next(n.meta["val"] for n in graph.graph.find_nodes(op="placeholder"))
        with like.fake_mode:
            fake = torch.empty(value.shape, dtype=value.dtype, device=value.device)
        call.meta.update(val=fake, module="", source="")
        node.replace_all_uses_with(call)
    return finish(graph)


def _name_places(graph: torch.fx.GraphModule, decoded: Decoded) -> None:
    """Give calls the modules and lines that they had, if the calls are the same ones."""
    calls = [n for n in graph.graph.nodes if is_value(n) and n.target not in [f for f, _ in decoded.kept.values()]]
    if [name_of(n.target) for n in calls] == [name for name, _, _ in decoded.places]:
        for node, (_, module, source) in zip(calls, decoded.places, strict=True):
            node.meta.update(module=module, source=source)


def check_source(network: Network, saved: Network) -> None:
    """Raise `EngineError` if a network is another one than that whose graph was saved."""
    assert saved.lowered is not None
    if len(needed_nodes(saved.lowered)) < len(saved.lowered.graph.nodes):
        graph = copy_graph(saved.lowered)
        needed = needed_nodes(graph)
        for node in [node for node in reversed(graph.graph.nodes) if node not in needed]:
            graph.graph.erase_node(node)
        saved = lower(finish(graph), nan=saved.nan, passes=[])
    kinds, before = (collections.Counter(kind for _, kind in n.facts()["layers"]) for n in (network, saved))
    if kinds != before:
        differing = sorted(kind for kind in kinds | before if kinds[kind] != before[kind])
        raise EngineError(
            f"The graph does not give the engine's own network again: the layers {', '.join(differing)} are others in "
            "number. Save it without source=True."
        )


def networks_of(engine: Engine, sources: Sequence[Source]) -> list[Network]:
    """The network of an engine, or of each of several, made again of their graphs."""
    interfaces = [variant.interface for variant in engine.variants] or [engine.interface]
    if len(interfaces) != len(sources):
        raise EngineError(f"The file has {len(sources)} graphs for {len(interfaces)} engines.")
    return [network_of(*source[:2], interface, source[2]) for source, interface in zip(sources, interfaces)]


def rebuilt(engine: Engine, sources: Sequence[Source]) -> TRTModule:
    """The engine, or each of several, built again."""
    options = dict(engine.facts.get("built", {}).get("options", {}))
    if options.pop("configure", False):
        raise EngineError("The engine was built with configure=, which no file holds: convert the module again.")
    options["compute_capabilities"] = _capabilities(options.get("compute_capabilities"))
    networks = networks_of(engine, sources)
    engines = [_kept_or_built(network, options) for network in networks]
    if not engine.variants:
        made = dataclasses.replace(engines[0], report=_report(engine))
        return TRTModule(made, networks)
    variants = [
        dataclasses.replace(variant, size=len(made.data))
        for variant, made in zip(engine.variants, engines, strict=True)
    ]
    whole = joined(engines, engine.interface, variants)
    return TRTModule(dataclasses.replace(whole, report=_report(engine)), networks)


def _kept_or_built(network: Network, options: Mapping[str, Any]) -> Engine:
    """The engine of a network of `network_of`, which is built once and kept for the next time."""
    assert network.lowered is not None
    how = ("rebuilt", str(network.interface.to_json()))
    file = engine_cache.file_of(network.lowered, options, network.nan, False, content, *how)
    if (kept := engine_cache.read(file)) is not None:
        return kept
    engine = build(network, **options, progress=False)
    engine_cache.write(file, engine)
    return engine


def _capabilities(asked: Sequence[str] | None) -> Sequence[str] | None:
    """The GPUs to build for: those that were asked for, if the present one is among them, else the default."""
    if not asked or list(asked) == ["current"]:
        return None
    here = ".".join(map(str, torch.cuda.get_device_capability())) if torch.cuda.is_available() else asked[0]
    return asked if here in asked else None


def _report(engine: Engine) -> Any:
    """The report of an engine, for one that was built again and is not verified."""
    text = "that it computes what the engine did that it was built again for"
    return dataclasses.replace(
        engine.report, verified=None, assumptions=[*engine.report.assumptions, text], without_cuda_graphs=None
    )
