"""Quantization correction (build side)."""
