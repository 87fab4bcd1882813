"""Whole models with height and width, or length, dynamic: the table of benchmarks/dynamic_models.py.

By default one that pads and crops; `--all-models` takes every row whose package is here.
"""

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import dynamic_models

QUICK = ("pad and crop (ESRGAN)",)
MOST_ENGINES = 4


def pytest_generate_tests(metafunc):
    everything = metafunc.config.getoption("--all-models")
    rows = [row for row in dynamic_models.rows() if row.name in QUICK or everything]
    metafunc.parametrize("row", rows, ids=lambda row: row.name)


def test_every_size_is_served(row, device):
    try:
        found = dynamic_models.measure(row, device.type)
    except ImportError as error:
        pytest.skip(str(error))
    assert found.variants <= MOST_ENGINES
    assert found.error < (2e-2 if device.type == "cuda" else 1e-4)
