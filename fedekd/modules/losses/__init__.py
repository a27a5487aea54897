"""Loss terms of the training objectives."""
