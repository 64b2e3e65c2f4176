"""Embeddings on disk, and the embedder that computes them."""
