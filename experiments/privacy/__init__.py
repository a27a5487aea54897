"""Privacy of the travelling proxy: membership inference with and without noise."""
