"""Trust in the teacher of a gated distillation, measured at hospital scale."""
