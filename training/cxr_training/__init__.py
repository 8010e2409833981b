"""Data to model: manifests, splits, features, heads, evaluation, export."""
