"""Configurations: file lookup, parsing, error messages, building."""
