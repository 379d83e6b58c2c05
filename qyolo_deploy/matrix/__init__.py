"""Many builds of one recipe as a table: rows of methods, columns of settings, seeds in each cell."""
