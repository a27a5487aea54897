"""Data sets whose sites are real hospitals or regions."""
