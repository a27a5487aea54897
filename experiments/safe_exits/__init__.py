"""SAFE-KD against training on labels, over networks, data sets and seeds."""
