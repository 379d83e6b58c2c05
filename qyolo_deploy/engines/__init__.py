"""Building and running engines, one runtime a file."""
