"""Datasets, images as the network sees them, and the generated default data (runtime side)."""
