"""From the traced network to ONNX, float and quantized (build side)."""
