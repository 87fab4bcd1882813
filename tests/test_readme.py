"""README.md is true: its Python runs, in order, and so do its `torch2rt` commands."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from torch2rt.cli.main import main
from torch2rt.registry import REGISTRY, load

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.M | re.S)


def test_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(REGISTRY, "converters", dict(load().converters))  # a block adds one
    namespace = {"__name__": "readme"}
    for block in blocks("python"):
        lines = block.splitlines()
        if not torch.cuda.is_available():
            lines = ["" if "# needs a GPU" in line else line for line in lines]
        line = README[: README.index(block)].count("\n")
        exec(compile("\n" * line + "\n".join(lines), "README.md", "exec"), namespace)


COMMANDS = [c for b in blocks("sh") for c in re.findall(r"^(?:.*/bin/)?torch2rt (.*?)(?: +#.*)?$", b, re.M)]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(command)) == 0


def test_every_fenced_block_is_run_or_a_command():
    assert len(COMMANDS) == 3
    assert len(re.findall(r"^```\w", README, re.M)) == len(blocks("python")) + len(blocks("sh"))


def test_paths_and_extras_exist():
    root = Path(__file__).parent.parent
    for path in re.findall(r"`(?:python )?((?:torch2rt|converters|tests|examples|benchmarks|\.ci)/[\w./]*)`", README):
        assert (root / path).exists(), path
    extras = (root / "setup.py").read_text(encoding="utf-8")
    for extra in {e for group in re.findall(r"\[([a-z,]+)\]'", README) for e in group.split(",")}:
        assert f'"{extra}": [' in extras, extra
