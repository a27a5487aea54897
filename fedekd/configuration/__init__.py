"""Configurations: lookup of files, parsing, error messages, and the objects built from them."""
