"""Training of float and of fake-quantized detectors (build side)."""
