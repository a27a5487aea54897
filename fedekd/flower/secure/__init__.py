"""Secure aggregation (SecAgg+): the server receives only the mean of the updates."""
