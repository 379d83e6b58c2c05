"""The float network as one small graph, its quantizers and its fake-quantized form (build side)."""
