"""Experiments on published papers; not part of the package."""
