"""Tables of docs/results/, computed from results/."""
