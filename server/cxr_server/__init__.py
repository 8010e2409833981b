"""The process in the serving pod: standard protocols in front of TorchServe."""

import os

# TorchServe is started by fork and exec; gRPC need not survive a fork, and warns when it must.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
