"""Before a run: what it will cost, and whether this machine can run it."""
