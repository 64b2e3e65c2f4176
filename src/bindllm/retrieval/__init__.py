"""Where embeddings are kept and found again."""
