"""What a release proves of itself on the machine that it runs on: golden vectors and accuracy; no torch."""
