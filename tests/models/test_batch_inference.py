"""The example of Ray Data: two workers on this machine, whose rows come in order, also if one of them is killed."""

import os
import signal

import numpy as np
import pytest
import torch
from test_examples import ROOT, load

from torch2rt import save, torch2rt


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(5, 3)

    def forward(self, x):
        return {"y": self.layer(x).relu(), "sum": x.sum(1)}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The example, the path of a model, the model, and rows of inputs."""
    ray = pytest.importorskip("ray", reason="examples/batch_inference.py needs ray[data]")
    pytest.importorskip("ray.data", reason="examples/batch_inference.py needs ray[data]")
    folders = os.pathsep.join([str(ROOT / "examples"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"env_vars": {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}}
    ray.init(num_cpus=3, num_gpus=0, include_dashboard=False, runtime_env=environment, log_to_driver=False)
    model, path = Net().eval(), tmp_path_factory.mktemp("batch") / "model.t2rt"
    save(torch2rt(model, [torch.randn(4, 5)], max_batch_size=8, progress=False), path, source=True)
    rows = np.random.default_rng(1).random((200, 5)).astype(np.float32)
    yield load("examples/batch_inference.py"), str(path), model, rows
    ray.shutdown()


@pytest.mark.parametrize("killed", [False, True], ids=["whole", "killed"])
def test_rows_come_in_order_and_none_is_lost(ran, tmp_path, killed):
    import ray

    example, path, model, rows = ran
    mark = tmp_path / "killed"

    class Mortal(example.Worker):
        """The worker that meets row 100 first dies once."""

        def __call__(self, batch):
            if killed and 100 in batch["row"] and not mark.exists():
                mark.write_text("once")
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(batch)

    dataset = ray.data.from_items([{"row": i, "x": x} for i, x in enumerate(rows)], override_num_blocks=8)
    found = example.infer(dataset, path, workers=2, batch_size=6, reference=True, worker=Mortal).take_all()
    assert [row["row"] for row in found] == list(range(len(rows))) and mark.exists() == killed
    with torch.no_grad():
        expected = model(torch.from_numpy(rows))
    names = [name for name in found[0] if name.startswith("output_")]
    assert len(names) == 2
    for name, theirs in zip(sorted(names), expected.values(), strict=True):
        ours = torch.from_numpy(np.stack([row[name] for row in found])).float()  # Ray makes numbers of 0-d arrays
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
