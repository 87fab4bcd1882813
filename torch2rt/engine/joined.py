"""Several engines as one value: each serves a part of the range, where no single one is right for all of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch2rt.engine.engine import Engine
from torch2rt.engine.report import Report, Verification
from torch2rt.engine.variant import EngineVariant
from torch2rt.engine.weights import FACT
from torch2rt.interface import Interface


def joined(engines: Sequence[Engine], interface: Interface, variants: Sequence[EngineVariant]) -> Engine:
    """The engine that holds several: `interface` is that of all of them together.

    The plans lie one after the other in its data, each with a copy of the weights that it needs.
    """
    first, reports = engines[0], [engine.report for engine in engines]
    verified = None
    if all(report.verified is not None for report in reports):
        parts: list[Verification] = [report.verified for report in reports if report.verified is not None]
        verified = Verification(
            parts[0].mode,
            parts[0].by,
            round(sum(part.seconds for part in parts), 3),
            [difference for part in parts for difference in part.differences],
            list(dict.fromkeys(note for part in parts for note in part.notes)),
        )
    report = Report(
        verified,
        list(dict.fromkeys(text for report in reports for text in report.assumptions)),
        variants=[str(variant) for variant in variants],
    )
    data = b"".join(engine.data for engine in engines)
    facts = dict(first.facts)
    if weights := [told for engine in engines for told in engine.facts.get(FACT, [])]:
        facts[FACT] = weights
    whole = dataclasses.replace(first, data=data, interface=interface, report=report, facts=facts)
    return dataclasses.replace(whole, variants=tuple(variants))
