"""torch2trt's keywords: what each of them is in torch2rt, or one line that says what replaces it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch2rt.arguments import whole_number
from torch2rt.errors import InputError

ALGORITHMS = {  # torch2trt's and TensorRT's names of calibration algorithms, in lower case
    "entropy_calibration": "entropy",
    "entropy_calibration_2": "entropy",
    "legacy_calibration": "percentile",
    "minmax_calibration": "minmax",
    "iint8entropycalibrator": "entropy",
    "iint8entropycalibrator2": "entropy",
    "iint8legacycalibrator": "percentile",
    "iint8minmaxcalibrator": "minmax",
    **{name: name for name in ("entropy", "minmax", "percentile", "mse")},
}
_GONE: dict[str, tuple[Any, str]] = {  # and the value that asks for nothing
    "use_onnx": (False, "there is no ONNX route: torch2rt traces the module itself"),
    "onnx_opset": (None, "there is no ONNX route: torch2rt traces the module itself"),
    "dla_core": (None, "engines for DLA need configure=: a function that sets IBuilderConfig.DLA_core"),
    "gpu_fallback": (True, "it is for DLA; configure= sets BuilderFlag.GPU_FALLBACK"),
    "device_types": ({}, "layers go to one device; configure= is given the IBuilderConfig, for set_device_type"),
}
KEYWORDS = frozenset(
    """
        fp16_mode int8_mode int8_calib_dataset int8_calib_algorithm int8_calib_batch_size int8_calib_cache
        strict_type_constraints default_device_type avg_timing_iterations
    """.split()
) | set(_GONE)


def from_torch2trt(given: Mapping[str, Any], precision: dict[str, Any]) -> tuple[dict[str, Any], int | None]:
    """The arguments about precision with torch2trt's keywords in them, and how often the builder is to time a kernel.

    - `fp16_mode`: `precision="fp16"`. `int8_mode`: `precision="int8"`, with float16 where there is no int8, as
      torch2trt has it with `fp16_mode` and TensorRT chooses without.
    - `int8_calib_dataset`: `calibration`, in batches of `int8_calib_batch_size`; each item is the list of inputs of one
      call. `int8_calib_algorithm`: `calibration_method`. `int8_calib_cache`: `calibration_cache`.
    - `strict_type_constraints`: a network is strongly typed in any case.
    - `default_device_type`: the GPU. `avg_timing_iterations`: set in the `IBuilderConfig`.

    Raises `TypeError` for a keyword that torch2trt has not either, and `InputError`, with what replaces it, for a value
    that asks for what torch2rt does not do.
    """
    for name, value in given.items():
        if name not in KEYWORDS:
            raise TypeError(f"torch2rt() got an unexpected keyword argument {name!r}")
        if name in _GONE and value not in (_GONE[name][0], None):
            raise InputError(f"{name}={value!r}: {_GONE[name][1]}.")
    if "dla" in str(given.get("default_device_type", "")).lower():
        raise InputError(
            "default_device_type: engines for DLA need configure=: set IBuilderConfig.default_device_type."
        )
    if not given.get("int8_mode"):
        for name in ("int8_calib_dataset", "int8_calib_algorithm", "int8_calib_cache"):
            if given.get(name) is not None:
                raise InputError(f"{name} is given without int8_mode=True.")
    options = dict(precision)
    if given.get("int8_mode"):
        _set(options, "precision", "int8", "int8_mode=True")
        _set(options, "calibration", _batched(given), "int8_calib_dataset")
        _set(options, "calibration_method", _method(given.get("int8_calib_algorithm")), "int8_calib_algorithm")
        _set(options, "calibration_cache", given.get("int8_calib_cache"), "int8_calib_cache")
    elif given.get("fp16_mode"):
        _set(options, "precision", "fp16", "fp16_mode=True")
    return options, whole_number("avg_timing_iterations", given.get("avg_timing_iterations"), 1)


def _set(options: dict[str, Any], name: str, value: Any, keyword: str) -> None:
    if value is None:
        return
    if options.get(name) not in (None, value):
        raise InputError(f"{keyword} and {name}={options[name]!r} contradict each other.")
    options[name] = value


def _method(algorithm: Any) -> str | None:
    """The method that an algorithm means: its own name, torch2trt's, or that of a member of TensorRT's enumeration."""
    if algorithm is None:
        return None
    name = getattr(algorithm, "name", algorithm if isinstance(algorithm, str) else getattr(algorithm, "__name__", ""))
    if (found := ALGORITHMS.get(str(name).rpartition(".")[2].lower())) is None:
        raise InputError(f"int8_calib_algorithm={algorithm!r} is none of {', '.join(sorted(ALGORITHMS))}.")
    return found


def _batched(given: Mapping[str, Any]) -> Any:
    """A calibration set as torch2trt takes it, each item a list of inputs with a batch, in larger batches."""
    dataset = given.get("int8_calib_dataset")
    size = whole_number("int8_calib_batch_size", given.get("int8_calib_batch_size"), 1)
    if dataset is None or size in (None, 1):
        return dataset
    return _Batches(dataset, size)


class _Batches:
    """So many items of a dataset at a time, joined along the first dimension."""

    def __init__(self, dataset: Any, size: int) -> None:
        self.dataset, self.size = dataset, size

    def __iter__(self) -> Any:
        import torch

        items: list[Any] = []
        for index in range(len(self.dataset)):
            items.append(self.dataset[index])
            if len(items) == self.size or index == len(self.dataset) - 1:
                yield [torch.cat(parts) for parts in zip(*items, strict=True)]
                items = []
