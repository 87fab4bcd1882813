"""New weights for an engine on a GPU, from the GPU's own memory."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import on_device
from torch2rt.backend.tensorrt import DTYPES, LOG, trt
from torch2rt.errors import EngineError
from torch2rt.runtime.pool import ContextPool

THREADS = 16  # that TensorRT may prepare weights with
BUSY = "A CUDA stream that the engine runs on is being captured: refit after that."


def refit_engine(
    pool: ContextPool, weights: Mapping[str, torch.Tensor], others: Callable[[], Mapping[str, torch.Tensor]] = dict
) -> bool:
    """Give an engine that was built with `refittable` weights by name; `False` if TensorRT refuses them.

    `others` has those that TensorRT may ask for, too, as it has merged them with some that are given.

    Calls that were enqueued before have ended with the old weights by then, and calls that come meanwhile wait. CUDA
    graphs are captured again. After a refusal the engine may have some of the new weights, and must not be used.
    Raises `EngineError` while a stream that it runs on is being captured.
    """
    with pool.lock, on_device(pool.index), cuda.beside_captures():
        pool.drop_graphs()
        if pool.graphs:
            raise EngineError(BUSY)
        with pool.loaded.lock.exclusive():
            if not pool.synchronize():
                raise EngineError(BUSY)
            with LOG.capture():
                pool.loaded.refitter = pool.loaded.refitter or _refitter(pool.loaded.engine)
                return _refit(pool, dict(weights), others)


def _refitter(engine: Any) -> Any:
    """What changes the weights of an engine. It compiles when it first does, for each weight."""
    refitter = trt.Refitter(engine, LOG)
    refitter.max_threads = max(1, min(os.cpu_count() or 1, THREADS))
    refitter.weights_validation = False  # it looks at roundings to other types, and the types of networks are settled
    return refitter


def _refit(
    pool: ContextPool, weights: dict[str, torch.Tensor], others: Callable[[], Mapping[str, torch.Tensor]]
) -> bool:
    refitter = pool.loaded.refitter
    held: dict[str, torch.Tensor] = {}
    if not set(refitter.get_all_weights()).issuperset(weights):
        return False
    try:
        while weights:
            held |= {name: weight.to(pool.device).contiguous() for name, weight in weights.items()}
            torch.cuda.current_stream(pool.device).synchronize()  # they are there, before TensorRT reads them
            for name in weights:
                described = trt.Weights(DTYPES[held[name].dtype], held[name].data_ptr(), held[name].numel())
                if not refitter.set_named_weights(name, described, trt.TensorLocation.DEVICE):
                    return False
            if missing := set(refitter.get_missing_weights()):
                known = others()
                if not missing <= known.keys() - held.keys():
                    return False
                weights = {name: known[name] for name in missing}
            else:
                weights = {}
        return bool(refitter.refit_cuda_engine_async(pool.stream)) and cuda.synchronize(pool.stream)
    finally:
        for name in held:
            refitter.unset_named_weights(name)  # else the next refit reads them again, where they are no more
