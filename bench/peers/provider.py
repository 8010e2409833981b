"""Time a graph under one execution provider, on one thread: seconds of each run, as JSON."""

import json
import sys
import time

import numpy as np
import onnxruntime as ort

_WARM_UP = 5
_RUNS = 40
# OpenVINO's own; ONNX Runtime's session options do not reach it.
_ONE_THREAD = {"device_type": "CPU", "num_of_threads": "1", "num_streams": "1"}

path, provider, side = sys.argv[1], sys.argv[2], int(sys.argv[3])
options = ort.SessionOptions()
options.intra_op_num_threads = 1
options.log_severity_level = 3
given = [_ONE_THREAD] if provider == "OpenVINOExecutionProvider" else None
session = ort.InferenceSession(path, options, providers=[provider], provider_options=given)
assert session.get_providers()[0] == provider  # noqa: S101 - else nothing would be compared
inputs = session.get_inputs()[0]
image = np.random.default_rng(0).normal(size=(1, 3, side, side)).astype(np.float32)
output = session.get_outputs()[0].name
for _ in range(_WARM_UP):
    session.run([output], {inputs.name: image})
seconds = []
for _ in range(_RUNS):
    start = time.perf_counter()
    session.run([output], {inputs.name: image})
    seconds.append(time.perf_counter() - start)
print(json.dumps({"seconds": seconds, "onnxruntime": ort.__version__}))
