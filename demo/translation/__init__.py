"""A translation Transformer trained on programs' catalogues, with torch's attention and ours."""
