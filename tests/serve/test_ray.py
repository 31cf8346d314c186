"""examples/ray_data.py: two actors over a data set, each on a CPU of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from .helpers import PACKAGE, environment

EXAMPLE = Path(PACKAGE) / "examples" / "ray_data.py"

MAP = """
import json, os, sys, time
import numpy as np
import ray
import ray_data

ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False)
x = np.load(sys.argv[2])
meeting = sys.argv[4]  # so that one actor does not do all the work before the other is there


class Spy(ray_data.Predictor):
    def __call__(self, batch):
        open(os.path.join(meeting, str(os.getpid())), "w").close()
        end = time.monotonic() + 120
        while len(os.listdir(meeting)) < 2 and time.monotonic() < end:
            time.sleep(0.05)
        out = super().__call__(batch)
        count = len(batch["data"])
        where = {"pid": os.getpid(), "cpu": min(os.sched_getaffinity(0)), "cpus": len(os.sched_getaffinity(0))}
        return out | {"index": batch["index"]} | {k: np.full(count, v) for k, v in where.items()}


ray_data.Predictor = Spy
table = ray.data.from_items([{"data": row, "index": k} for k, row in enumerate(x)]).repartition(8)
rows = ray_data.predict(table, sys.argv[1], actors=2, threads=1, batch_size=5).take_all()
rows.sort(key=lambda r: r["index"])
assert [r["index"] for r in rows] == list(range(len(x)))
np.save(sys.argv[3], np.stack([r["y"] for r in rows]))
print(json.dumps(sorted({(int(r["pid"]), int(r["cpu"]), int(r["cpus"])) for r in rows})))
"""


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A module with one input, batch 4, and its ONNX file."""
    import onnx

    from .model import build

    folder = tmp_path_factory.mktemp("ray")
    model = build()
    for part in (model.graph.input, model.graph.output):
        del part[1]
    del model.graph.node[-1]
    onnx.save(model, folder / "one.onnx")
    command = [sys.executable, "-m", "skimtvm", "compile", "one.onnx", "-o", "one.so", "--batch", "4", "--quiet"]
    subprocess.run(command, check=True, env=environment(), cwd=folder)
    return folder / "one.so"


@pytest.mark.slow
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="two actors need two CPUs of their own")
def test_two_actors(classifier, tmp_path):
    python = os.environ.get("SKIMTVM_RAY_PYTHON", sys.executable)
    if subprocess.run([python, "-c", "import ray.data"], capture_output=True, check=False).returncode:
        pytest.skip(
            "Ray Data is not installed: pip install 'skimtvm[ray]', or name a Python that has it in SKIMTVM_RAY_PYTHON"
        )
    import onnxruntime

    x = np.random.default_rng(0).standard_normal((37, 3, 8, 8)).astype("float32")
    np.save(tmp_path / "x.npy", x)
    meeting = tmp_path / "meeting"
    meeting.mkdir()
    arguments = [classifier, tmp_path / "x.npy", tmp_path / "y.npy", meeting]
    command = [python, "-c", MAP, *map(str, arguments)]
    env = environment()
    env["PYTHONPATH"] += os.pathsep + str(EXAMPLE.parent)  # for the actors, which are processes of their own
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    actors = json.loads(done.stdout.splitlines()[-1])
    assert len({pid for pid, _, _ in actors}) == 2, actors  # both worked, each process on one CPU of its own
    assert len({cpu for _, cpu, _ in actors}) == 2 and all(count == 1 for _, _, count in actors), actors
    session = onnxruntime.InferenceSession(str(classifier.with_suffix(".onnx")), providers=["CPUExecutionProvider"])
    (want,) = session.run(None, {"x": x})
    np.testing.assert_allclose(np.load(tmp_path / "y.npy"), want, rtol=1e-4, atol=1e-5)
