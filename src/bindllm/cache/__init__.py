"""The visual cache: kNN retrieval over image embeddings."""
