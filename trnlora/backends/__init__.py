"""Parallel layers for the model: torch.distributed (cpu, cuda) and NxD (Trainium)."""
