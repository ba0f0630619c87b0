"""`hicachectl`: what an operator does to a running server, over its HTTP API and nothing else."""
