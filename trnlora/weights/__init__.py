"""Weights on disk: HF folders, NxD's shards, adapters, and what moves, checks and merges them."""
