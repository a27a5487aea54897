"""Comparison of `results/` with the FedeKD paper (arXiv 2605.05553v1)."""
