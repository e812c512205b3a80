"""The training run: ranks, batches, loop, checkpoints, progress."""
