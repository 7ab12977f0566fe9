"""Kernels of the lightning indexer, lowered through Triton: `scores` reads the paged keys once, `topk` selects."""
