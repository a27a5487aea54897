"""Coverage of exit guarantees per class, per group and per patient."""
