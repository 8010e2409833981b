"""What training and serving must agree on: decoding, preprocessing, configuration, inference.

The modules :mod:`cxr.errors`, :mod:`cxr.decode`, :mod:`cxr.preprocess` and :mod:`cxr.engine` travel
inside every model archive and run in a stock TorchServe worker, so they import nothing beyond the
standard library, NumPy, Pillow and ONNX Runtime.
"""

__version__ = "0.1.0"
