"""Private models that start from pretrained weights, and frozen parts."""
