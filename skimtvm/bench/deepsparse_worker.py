"""DeepSparse in a process of its own: run by a Python that has DeepSparse and NumPy, but neither SkimTVM nor TVM.

One JSON object a line comes in on stdin, one goes out on what was stdout (the engine's own output goes to stderr)::

    {"do": "load", "model": "m.onnx", "inputs": ["x.npy"], "batch": 1, "threads": 1} -> {"version": "1.8.0"}
    {"do": "run", "calls": 10}                                                       -> {"seconds": [...]}
    {"do": "outputs", "file": "y.npz"}                                               -> {"count": 1}

A command that fails answers {"error": "..."}. The process ends when stdin does.
"""

import json
import os
import sys
import time

del sys.path[0]  # this folder, whose modules are nobody's packages
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Worker:
    """The engine and its inputs."""

    def load(self, model, inputs, batch, threads):
        import deepsparse
        import numpy as np

        self.inputs = [np.load(f) for f in inputs]
        self.engine = deepsparse.Engine(model, batch_size=batch, num_cores=threads)
        return {"version": deepsparse.__version__}

    def run(self, calls):
        seconds = []
        for _ in range(calls):
            begin = time.perf_counter()
            self.engine.run(self.inputs)
            seconds.append(time.perf_counter() - begin)
        return {"seconds": seconds}

    def outputs(self, file):
        import numpy as np

        arrays = self.engine.run(self.inputs)
        np.savez(file, *arrays)
        return {"count": len(arrays)}


def main():
    worker = Worker()
    for line in sys.stdin:
        try:
            request = json.loads(line)
            answer = getattr(worker, request.pop("do"))(**request)
        except Exception as e:  # the other side decides what a failure means
            answer = {"error": f"{type(e).__name__}: {e}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
