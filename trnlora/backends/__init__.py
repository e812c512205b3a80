"""What differs between backends: parallel layers, placement, saving and environment, for torch.distributed and NxD."""
