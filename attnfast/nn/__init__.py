"""The layer: `MultiheadAttention`, what it is made of, and what puts it into models."""
