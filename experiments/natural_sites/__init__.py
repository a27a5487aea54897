"""Federations whose clients are real sites: hospitals, regions, image domains."""
