"""Detector architectures, and checkpoints that are read as data."""
