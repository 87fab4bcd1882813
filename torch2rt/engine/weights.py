"""Which weights a plan that can be refitted was built with, told by their contents."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch2rt.engine.engine import Engine
from torch2rt.network import Network
from torch2rt.recipes.contents import contents

FACT = "weights"  # of an engine: for each of its networks, the contents of its weights by name


def named(network: Network) -> dict[str, torch.Tensor]:
    """The weights of a network by the names that an engine knows them by."""
    tensors = {w.number: w.tensor for w in network.weights.values() if w.number is not None}
    return {name: tensors[number] for number, name in reversed(network.weight_names().items())}


def told(network: Network) -> dict[str, str]:
    """What tells the contents of a network's weights from others, as JSON values."""
    return {name: str(content) for name, content in contents(named(network)).items()}


def differing(engine: Engine, networks: Sequence[Network]) -> list[dict[str, torch.Tensor]] | None:
    """The weights of each network, by name, that are others in the plan of an engine.

    `None` where the engine does not tell, or has other names: it cannot be given the weights of these networks.
    """
    built = engine.facts.get(FACT)
    if not isinstance(built, list) or len(built) != len(networks):
        return None
    found = []
    for before, network in zip(built, networks, strict=True):
        now, tensors = told(network), named(network)
        if not isinstance(before, dict) or before.keys() != now.keys():
            return None
        found.append({name: tensors[name] for name in now if now[name] != before[name]})
    return found
