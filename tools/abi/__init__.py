"""Proof that one wheel serves every Python and torch: see ``python -m tools.abi --help``."""
