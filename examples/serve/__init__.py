"""HTTP service of a model that `fedekd export --format onnx` wrote."""
