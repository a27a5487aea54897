"""The FedeKD paper (arXiv 2605.05553v1): its published numbers, and the results in `results/` compared with them."""
