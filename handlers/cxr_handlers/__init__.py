"""The TorchServe handler that travels inside every archive."""
