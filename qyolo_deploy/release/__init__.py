"""Manifests, release folders, their verification, and reports."""
