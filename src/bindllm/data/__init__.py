"""From rows of a data source to batches of token ids, labels and embeddings."""
