"""What training and serving must agree on: decoding, preprocessing, configuration, inference.

The modules :mod:`cxr.errors`, :mod:`cxr.dicom`, :mod:`cxr.decode`, :mod:`cxr.preprocess` and
:mod:`cxr.engine` travel inside every model archive and run in a stock TorchServe worker, so they
import nothing beyond the standard library, NumPy, Pillow and ONNX Runtime; pydicom is imported when
the first DICOM file comes, if it is there.
"""

import os

# ONNX Runtime 1.29 and newer tell their makers about each process and model, over the network.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"
