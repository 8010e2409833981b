"""Model to `.mar`: the packager and its checks."""
