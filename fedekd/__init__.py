"""Federated distillation that knows when to trust."""
