"""Configurations: where they are found, how they are parsed and what is said of a mistake, and what they build."""
