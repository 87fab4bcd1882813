"""Converted modules as one file that says what it needs, checks itself, and can be built again elsewhere."""

from __future__ import annotations

import functools
import logging
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import torch

from torch2rt.background.conversion import RESULT, result_of
from torch2rt.background.job import Job
from torch2rt.background.module import BackgroundModule, check_on_ready, gpu_of
from torch2rt.conversion.rebuilt import check_source, network_of, networks_of, rebuilt
from torch2rt.debug.comparison import Comparison
from torch2rt.engine import container
from torch2rt.engine.engine import Engine
from torch2rt.engine.fingerprint import differences, present
from torch2rt.engine.manifest import KIND, readable
from torch2rt.engine.report import Difference, Verification
from torch2rt.engine.source import encode
from torch2rt.errors import AccuracyError, EngineError, InputError
from torch2rt.runtime.module import TRTModule
from torch2rt.runtime.saved import Reader, Source, Writer, write_module
from torch2rt.runtime.stateful import StatefulModule
from torch2rt.structure import flatten, is_same, unflatten
from torch2rt.tracing.calls.randomness import same_states
from torch2rt.tracing.trace import as_arguments

REBUILD = ("never", "auto")
LOGGER = logging.getLogger("torch2rt")
# How far off a saved output another GPU's may be, in parts of its largest number: float32 may be TF32.
ALLOWED = {torch.float32: 4e-3, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def save(
    model_trt: Any,
    path: str | PathLike[str],
    *,
    inputs: Any = None,
    kwargs: Mapping[str, Any] | None = None,
    source: bool = False,
    kernels: bool = True,
    key: bytes | None = None,
) -> None:
    """Write what `torch2rt()` has returned to one file, which `torch2rt.load` reads.

    The file holds data and no code: engines with their calling convention, torch segments, state, and what they were
    built with. Every part of it has a digest. It is there whole or not at all.

    - `model_trt`: a `TRTModule`, a `PartitionedModule`, a `StatefulModule`, or a `BackgroundModule` whose engine is
      built. Settings of calls, such as `cuda_graph`, are not saved.
    - `inputs`, `kwargs`: an example, given as to `torch2rt()`. It is kept in the file with the outputs that the engine
      gives for it (the reference, where there is no GPU), for `load(verify=True)`.
    - `source`: keep the graphs of the engines and their weights, too, of which `load(rebuild="auto")` builds them again
      with another TensorRT or for another GPU. It is made sure that they give the same networks; that takes as long as
      tracing and lowering did. The file is larger by the weights.
    - `kernels`: keep what TensorRT for RTX has compiled for the GPUs that the module was used on, so that the next
      process need not.
    - `key`: bytes, with which the file is signed: an HMAC-SHA256 over all of it, for `load(key=...)`.

    Raises `InputError` for what is no converted module, and `EngineError` for one that cannot be saved as asked.

    >>> import tempfile
    >>> from torch2rt import load, torch2rt
    >>> x = torch.randn(2, 3)
    >>> model_trt = torch2rt(torch.nn.Linear(3, 5).eval(), [x], max_batch_size=8)
    >>> file = tempfile.mktemp()
    >>> save(model_trt, file, inputs=[x], source=True)
    >>> load(file).input_names
    ['input']
    """
    key = container.check_key(key)
    if isinstance(model_trt, BackgroundModule):
        model_trt = model_trt.finished("what to save")
    writer = Writer(source, kernels)
    module, example = _module(model_trt, writer), None
    if inputs is not None or kwargs is not None:
        example = _example(model_trt, *as_arguments(inputs if inputs is not None else (), kwargs), writer)
    _write(path, module, example, writer, key)


def _module(model_trt: Any, writer: Writer) -> dict[str, Any]:
    """A module as the file holds it; it is made sure that its graphs give its networks."""
    module = writer.module(model_trt)
    for network in writer.networks:
        assert network.lowered is not None
        nodes, tensors = encode(network.lowered)
        check_source(network_of(nodes, tensors, network.interface, network.nan), network)
    return module


def _write(path: str | PathLike[str], module: Any, example: Any, writer: Writer, key: bytes | None) -> None:
    manifest = {"kind": KIND, "saved_by": present(), "module": module, "example": example}
    container.write(path, manifest, writer.parts, key)


def load(
    path: str | PathLike[str],
    *,
    verify: bool = False,
    rebuild: str = "never",
    write_back: bool = False,
    key: bytes | None = None,
    background: bool = False,
    module: Any = None,
    on_ready: Callable[[Any], None] | None = None,
) -> Any:
    """The module in a file of `torch2rt.save`, without the Python of the module that it was converted from.

    An engine is code to TensorRT, which runs it: load only files that you trust. What torch2rt itself reads is data.

    Every byte is checked against the digests in the file. The engine is memory of the file, of which there is no other
    copy, so the file must not be written to while the module is in use; replacing it as a whole is safe. Of a file with
    `source=True`, `model_trt.reference()` evaluates the engine's network, as after a conversion.

    - `verify`: compare with the outputs that were saved for an example; raises `AccuracyError` where they differ by
      more than roundings. It needs a GPU.
    - `rebuild`: what is done where an engine was built by another TensorRT, or for another GPU. `"never"` raises
      `EngineError`, which says what differs. `"auto"` builds it again of the graph in the file, if that was saved with
      `source=True`, and compares the result with the saved example, if there is one. The engine is kept in the cache
      of engines, so that the next process builds none.
    - `write_back`: with `rebuild="auto"`, replace the file by one with the engine that was built again, as a whole and
      after its comparison with the example. It is signed with `key`, if the file was. Raises `OSError` where that is
      not possible.
    - `key`: the bytes that the file was signed with. A file that is not, or was changed since, is refused before
      anything else of it is read. Without `key`, a signature is not looked at.
    - `background`: `True` returns a `BackgroundModule` at once, whose calls run `module` until the engine is loaded and
      warm. Where it is to be built again, a helper process does that. Errors are in `model_trt.error`, and raised by
      `model_trt.wait()`. `on_ready`: called with the module when it is ready.

    Raises `EngineError` for a file that is damaged (it says where), that is none of `torch2rt.save`, or whose engine
    cannot be used here.

    >>> model_trt = load("model.t2rt")                      # doctest: +SKIP
    >>> y = model_trt(x)                                    # doctest: +SKIP
    """
    if rebuild not in REBUILD:
        raise InputError(f"{rebuild=} is not one of {', '.join(map(repr, REBUILD))}.")
    if not isinstance(verify, bool):
        raise InputError(f"{verify=} is neither True nor False.")
    if not isinstance(write_back, bool) or write_back and rebuild != "auto":
        raise InputError(f"{write_back=} is not False, and not True with rebuild='auto', which may build an engine.")
    key = container.check_key(key)
    check_on_ready(on_ready, background)
    if background != (module is not None) or not (module is None or callable(module)):
        raise InputError("background=True needs module=, a module that answers until the engine is ready, and only it.")
    if not background:
        return _loaded(path, verify, rebuild, key, write_back)
    path = os.path.abspath(path)  # the working folder may be another one by then
    job = Job(_load_to, path, verify, key, write_back) if rebuild == "auto" else None
    make = functools.partial(_loaded_or_rebuilt, path, verify, key, job)
    return BackgroundModule(module, make, job.stop if job is not None else lambda: None, on_ready, gpu_of(module))


def _loaded_or_rebuilt(path: str | PathLike[str], verify: bool, key: bytes | None, job: Job | None) -> Any:
    """The module in a file, of a helper process where its engine has to be built again."""
    try:
        loaded = _loaded(path, verify, "never", key, False, tries=job is not None)
    except EngineError:
        if job is None:
            raise
        return result_of(job)
    if job is not None:
        job.close()
    return loaded


def _load_to(folder: Path, path: str, verify: bool, key: bytes | None, write_back: bool) -> None:
    """What the helper does."""
    write_module(_loaded(path, verify, "auto", key, write_back), folder / RESULT)


def _loaded(
    path: str | PathLike[str],
    verify: bool,
    rebuild: str,
    key: bytes | None,
    write_back: bool,
    tries: bool | None = None,
) -> Any:
    """The module in a file. `tries` has a GPU load its engines, to see whether they have to be built again."""
    file = container.read(path, key)
    if write_back and file.is_signed and key is None:
        raise InputError(f"write_back=True: {file.name} is signed. Give the key=, with which it is signed again.")
    with readable(file):
        again: list[str] = []

        def engine_or_rebuilt(engine: Engine, sources: Sequence[Source]) -> TRTModule:
            reason = _why_not(engine, tries=rebuild == "auto" if tries is None else tries)
            if not reason:
                made = TRTModule(engine)
                if sources:
                    made.lower_later(functools.partial(networks_of, engine, sources))
                return made
            _refuse(file.name, engine, reason, rebuild, bool(sources))
            again.append(reason)
            return rebuilt(engine, sources)

        module = Reader(file, engine_or_rebuilt).module(file.manifest["module"])
        example = file.manifest["example"]
        if verify and example is None:
            raise EngineError(f"verify=True: {file.name} holds no example; save(..., inputs=[x]) keeps one.")
        if verify or (again and example is not None):
            _check_example(module, example, Reader(file), needs_engine=verify)
        if again and write_back:
            writer = Writer(source=True, kernels=True)
            written = _module(module, writer)
            _write(path, written, _again(example, Reader(file), writer), writer, key if file.is_signed else None)
    for reason in again:
        LOGGER.info("%s: an engine was built again, as it could not be used here:\n%s", file.name, reason)
    return module


# Engines that cannot be used here ------------------------------------------------------------------------------------


def _why_not(engine: Engine, tries: bool) -> str:
    """Why an engine cannot be used here; empty if it can, as far as is known, or where a GPU `tries` it."""
    if (found := differences(engine)).grave:
        return str(found)
    if tries and torch.cuda.is_available():
        try:
            TRTModule(engine).load(torch.device("cuda"))
        except EngineError as error:
            return "\n".join(filter(None, [f"  {error}", str(found)]))
    return ""


def _refuse(name: str, engine: Engine, reason: str, rebuild: str, has_source: bool) -> None:
    """Raise `EngineError` unless an engine is to be built again, and can be."""
    if rebuild == "auto" and has_source:
        return
    advice = 'torch2rt.load(path, rebuild="auto") builds it again of the graph in the file.'
    if not has_source:
        advice = (
            "Convert the module again; torch2rt.save(..., source=True) would have kept what it takes to rebuild it."
        )
    target = engine.made_by.get("target", "an unknown GPU")
    raise EngineError(f"{name}: the engine, built for {target}, cannot be used here:\n{reason}\n{advice}")


# The example ---------------------------------------------------------------------------------------------------------


def _example(model_trt: Any, args: Any, kwargs: Any, writer: Writer) -> dict[str, Any]:
    """An example's tensors and the module's outputs for them, as the file holds them."""
    leaves, form = flatten((tuple(args), dict(kwargs)), torch.is_tensor, "inputs")
    outputs, result, by = _run(model_trt, form, leaves)
    return {
        "inputs": [writer.tensor("example", x) for x in leaves],
        "arguments": form,
        "outputs": [writer.tensor("example", y) for y in outputs],
        "result": result,
        "allowed": [_allowed(model_trt, place, y, len(outputs)) for place, y in enumerate(outputs)],
        "by": by,
    }


def _again(example: Any, reader: Reader, writer: Writer) -> Any:
    """An example that was saved, for another file."""
    if example is None:
        return None
    moved = {
        name: [writer.tensor("example", reader.tensor(x)) for x in example[name]] for name in ("inputs", "outputs")
    }
    return {**example, **moved}


def _run(
    model_trt: Any, form: Any, leaves: Sequence[torch.Tensor], needs_engine: bool = False
) -> tuple[list[torch.Tensor], Any, str]:
    """A call's tensors and the form around them, of the engine where it runs, and what has computed them.

    The module's state and the tensors stay as they are.
    """
    if torch.cuda.is_available():
        device = _device_of(model_trt)
        args, kwargs = unflatten(form, [x.detach().clone().to(device) for x in leaves])
        with torch.no_grad(), same_states():
            if isinstance(model_trt, StatefulModule):
                state = {name: value.clone().to(device) for name, value in model_trt.state.items()}
                given, *_ = model_trt.converted(*args, state=state, **kwargs)
            else:
                given = model_trt(*args, **kwargs)
            outputs, result = flatten(given, torch.is_tensor, "result")
        return [y.cpu() for y in outputs], result, f"the engine on {torch.cuda.get_device_name(device)}"
    if needs_engine:
        raise EngineError("verify=True needs an NVIDIA GPU, and torch sees none.")
    args, kwargs = unflatten(form, [x.detach().clone() for x in leaves])
    with torch.no_grad(), same_states():
        outputs, result = flatten(model_trt.reference()(*args, **kwargs), torch.is_tensor, "result")
    return outputs, result, "the reference, which evaluates the network with torch"


def _device_of(model_trt: Any) -> torch.device:
    """The GPU that a module runs on, or will."""
    if isinstance(model_trt, StatefulModule):
        return next((x.device for x in model_trt.state.values() if x.is_cuda), torch.device("cuda"))
    return model_trt.device or torch.device("cuda")


def _allowed(model_trt: Any, place: int, output: torch.Tensor, count: int) -> float:
    """How far an output may be off what is saved: as the conversion was allowed, and a few roundings in any case."""
    names = [model_trt.output_names[leaf["output"]] for leaf in model_trt._interface().leaves if "output" in leaf]
    verified = model_trt.report.verified
    learned = 0.0
    if verified is not None and len(names) == count:
        learned = max((d.allowed for d in verified.differences if d.output == names[place]), default=0.0)
    if not (output.is_floating_point() or output.is_complex()):
        return learned
    largest = Comparison(output, output).largest
    return float(max(learned, ALLOWED.get(output.dtype.to_real(), ALLOWED[torch.float32]) * largest))


def _check_example(model_trt: Any, example: Mapping[str, Any], reader: Reader, needs_engine: bool) -> None:
    """Compare a module with the outputs that were saved; raises `AccuracyError` where they differ."""
    start = time.perf_counter()
    inputs, expected = (list(map(reader.tensor, example[name])) for name in ("inputs", "outputs"))
    outputs, result, by = _run(model_trt, example["arguments"], inputs, needs_engine)
    same = [(y.dtype, y.shape) for y in outputs] == [(y.dtype, y.shape) for y in expected]
    if not same or not is_same(result, example["result"]):
        raise AccuracyError(f"{by}, gives another result for the saved example than {example['by']}.")
    shapes = [list(x.shape) for x in inputs]
    found, wrong = [], []
    for place, (ours, theirs, allowed) in enumerate(zip(outputs, expected, example["allowed"], strict=True)):
        comparison = Comparison(ours, theirs)
        distance = comparison.distance
        error = distance.sum().item() if comparison.is_exact else distance.max().item() if distance.numel() else 0.0
        found.append(Difference(f"result {place}", shapes, error, float(allowed), comparison.largest))
        if not error <= allowed or math.isnan(error):
            wrong.append(found[-1])
    if wrong:
        listed = "\n".join(f"  {difference}" for difference in wrong)
        raise AccuracyError(f"{by}, differs from what was saved of {example['by']}:\n{listed}", wrong)
    seconds = round(time.perf_counter() - start, 3)
    model_trt.report.verified = Verification("example", f"{by}, with outputs saved by {example['by']}", seconds, found)
