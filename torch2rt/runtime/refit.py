"""New weights for an engine on a GPU, from the GPU's own memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from torch2rt.backend import cuda
from torch2rt.backend.cuda import on_device
from torch2rt.backend.tensorrt import DTYPES, LOG, trt
from torch2rt.errors import EngineError
from torch2rt.runtime.pool import ContextPool

BUSY = "A CUDA stream that the engine runs on is being captured: refit after that."


def refit_engine(pool: ContextPool, weights: Mapping[str, torch.Tensor]) -> bool:
    """Give an engine that was built with `refittable` weights by name; `False` if TensorRT refuses them.

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
            held = {name: weight.to(pool.device).contiguous() for name, weight in weights.items()}
            torch.cuda.current_stream(pool.device).synchronize()  # they are there, before TensorRT reads them
            with LOG.capture():
                return _refit(pool, held)


def _refit(pool: ContextPool, weights: Mapping[str, torch.Tensor]) -> bool:
    refitter = pool.loaded.refitter = pool.loaded.refitter or trt.Refitter(pool.loaded.engine, LOG)
    known = set(refitter.get_all_weights())
    if not known.issuperset(weights):
        return False
    try:
        for name, weight in weights.items():
            described = trt.Weights(DTYPES[weight.dtype], weight.data_ptr(), weight.numel())
            if not refitter.set_named_weights(name, described, trt.TensorLocation.DEVICE):
                return False
        if refitter.get_missing_weights() or not refitter.refit_cuda_engine_async(pool.stream):
            return False
        return cuda.synchronize(pool.stream)
    finally:
        for name in weights:
            refitter.unset_named_weights(name)  # else the next refit reads them again, where they are no more
