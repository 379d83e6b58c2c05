"""What a quantized tensor is: grids, scales, integers; no torch."""
