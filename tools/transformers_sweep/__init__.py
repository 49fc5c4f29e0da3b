"""Tiny models of all of transformers, with attnfast: ``python -m tools.transformers_sweep``."""
