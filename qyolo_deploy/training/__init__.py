"""What float training, quantization-aware training and correction have in common (build side)."""
