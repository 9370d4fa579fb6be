"""Low-rank surgery on transformers."""
