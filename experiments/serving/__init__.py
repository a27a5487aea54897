"""Weights of an ensemble's members at serving time."""
