"""Secure aggregation (SecAgg+): the server receives the mean of the sites' updates, but no single update."""
