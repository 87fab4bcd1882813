"""Run a data set through an engine on all GPUs of a cluster, with Ray Data.

    pip install 'torch2rt[batch]'
    python examples/batch_inference.py model.t2rt --workers 2             # an actor for each GPU
    python examples/batch_inference.py model.t2rt --workers 2 --reference # without GPUs, if saved with source=True

Each worker is an actor that loads the file once and keeps the engine warm. Rows come out in the order in which they
went in. A worker that dies is started again, and its batches are computed again, so that no row is lost or comes twice.
"""

import argparse

import numpy as np
import ray
import torch

from torch2rt import InputError, load
from torch2rt.structure import flatten, unflatten


class Worker:
    """Runs batches through a file of `torch2rt.save`; Ray makes one for each GPU.

    A batch is a dict of arrays by the names of the inputs. Its results are added to it, by the names of the outputs.
    """

    def __init__(self, path, reference=False, rebuild="never"):
        self.device = torch.device("cpu" if reference else "cuda")
        model = load(path, rebuild=rebuild)
        self.interface = model._interface()
        self.model = model.reference() if reference else model
        self.model.warm_up()

    def __call__(self, batch):
        tensors = [tensor(batch[spec.name], spec).to(self.device) for spec in self.interface.inputs]
        with torch.no_grad():
            args, kwargs = unflatten(self.interface.arguments, tensors)
            outputs, _ = flatten(self.model(*args, **kwargs), torch.is_tensor)
        names = [self.interface.outputs[leaf["output"]] for leaf in self.interface.leaves if "output" in leaf]
        return {**batch, **{name: y.cpu().numpy() for name, y in zip(names, outputs, strict=True)}}


def tensor(column, spec):
    """A column as the input takes it; raises `InputError` for numbers that its type does not hold."""
    given = torch.from_numpy(np.ascontiguousarray(column))
    made = given.to(spec.dtype)
    if not spec.dtype.is_floating_point and not torch.equal(made.to(given.dtype), given):
        raise InputError(f"The column '{spec.name}' has numbers that are no {spec.dtype}.")
    return made


def infer(dataset, path, workers, batch_size, reference=False, rebuild="never", worker=Worker):
    """The data set with the outputs as further columns, row by row in its order.

    - `workers`: actors, each with a GPU of its own unless `reference` is set. `batch_size`: rows of a call, at most
      what the engine serves.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    return dataset.map_batches(
        worker,
        fn_constructor_kwargs={"path": path, "reference": reference, "rebuild": rebuild},
        batch_size=batch_size,
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_gpus=0 if reference else 1,
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description="Run drawn rows through an engine, with Ray Data.")
    parser.add_argument("file")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, help="default: what the engine is tuned for")
    parser.add_argument("--reference", action="store_true", help="evaluate the network with torch, without GPUs")
    parser.add_argument("--rebuild", choices=("never", "auto"), default="never", help="as for torch2rt.load")
    arguments = parser.parse_args(argv)
    specs = load(arguments.file, rebuild=arguments.rebuild)._interface().inputs
    drawn = np.random.default_rng(0)
    columns = {
        spec.name: drawn.random((arguments.rows, *spec.opt[1:])).astype(str(spec.dtype).removeprefix("torch."))
        for spec in specs
    }
    rows = [{"row": i, **{name: values[i] for name, values in columns.items()}} for i in range(arguments.rows)]
    dataset = ray.data.from_items(rows, override_num_blocks=4 * arguments.workers)
    batch = arguments.batch_size or specs[0].opt[0]
    result = infer(dataset, arguments.file, arguments.workers, batch, arguments.reference, arguments.rebuild)
    print(result.materialize().stats())


if __name__ == "__main__":
    main()
