"""Examples that need the repository, run by `make` and by the tests."""
