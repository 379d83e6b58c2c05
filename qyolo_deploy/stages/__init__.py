"""The stages of a build, each a function from its context to the files that it wrote."""
