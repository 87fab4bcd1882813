"""A model of Triton's Python backend that runs the engine in `model.t2rt`; `torch2rt export-triton` copies this file.

Triton's Python needs torch, torch2rt and the TensorRT that built the engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

import torch2rt
from torch2rt.structure import flatten, unflatten


class TritonPythonModel:
    """What Triton makes of each instance."""

    def initialize(self, args: dict[str, Any]) -> None:
        """Load the engine and make it warm."""
        import triton_python_backend_utils as triton

        self.triton = triton
        self.batches = json.loads(args["model_config"])["max_batch_size"] > 0
        self.device = torch.device(f"cuda:{args['model_instance_device_id']}" if torch.cuda.is_available() else "cpu")
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        self.model = torch2rt.load(Path(args["model_repository"]) / args["model_version"] / "model.t2rt")
        self.model.warm_up()
        self.interface = self.model._interface()

    def execute(self, requests: list[Any]) -> list[Any]:
        """Answer requests, all by one call if they are batches of the same sizes, else one after the other."""
        given: list[Any] = []
        for request in requests:
            try:
                given.append([self._tensor(request, spec.name) for spec in self.interface.inputs])
            except Exception as error:
                given.append(error)
        fits = [tensors for tensors in given if not isinstance(tensors, Exception)]
        kinds = {tuple((x.dtype, tuple(x.shape[1:])) for x in tensors) for tensors in fits}
        # Rows of one request must not become another's, as they would where its inputs have unequal numbers of them.
        are_rows = all(len({x.shape[:1] for x in tensors}) == 1 and tensors[0].dim() for tensors in fits)
        if self.batches and are_rows and len(requests) == len(fits) > 1 and len(kinds) == 1:
            rows = [len(tensors[0]) for tensors in fits]
            outputs = self._outputs([torch.cat(parts) for parts in zip(*fits)])
            if not isinstance(outputs, Exception) and all(y.shape[:1] == (sum(rows),) for _, y in outputs):
                parts = zip(*[[(name, part) for part in y.split(rows)] for name, y in outputs])
                return [self._response(list(part)) for part in parts]
        return [self._response(x if isinstance(x, Exception) else self._outputs(x)) for x in given]

    def _tensor(self, request: Any, name: str) -> torch.Tensor:
        found = self.triton.get_input_tensor_by_name(request, name)
        if found is None:
            raise torch2rt.InputError(f"The request has no input '{name}'.")
        return from_dlpack(found.to_dlpack()).to(self.device)  # type: ignore[no-any-return]

    def _outputs(self, tensors: list[torch.Tensor]) -> Any:
        """The outputs with their names, or the error."""
        try:
            with torch.no_grad():
                args, kwargs = unflatten(self.interface.arguments, tensors)
                leaves, _ = flatten(self.model(*args, **kwargs), torch.is_tensor)
        except Exception as error:
            return error
        places = [leaf["output"] for leaf in self.interface.leaves if "output" in leaf]
        found = {self.interface.outputs[place]: y for place, y in zip(places, leaves, strict=True)}
        return list(found.items())

    def _response(self, outputs: Any) -> Any:
        triton = self.triton
        if isinstance(outputs, Exception):
            return triton.InferenceResponse([], error=triton.TritonError(f"{type(outputs).__name__}: {outputs}"))
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # Triton reads the tensors on a stream of its own
        tensors = [triton.Tensor.from_dlpack(name, to_dlpack(y.contiguous())) for name, y in outputs]
        return triton.InferenceResponse(tensors)
