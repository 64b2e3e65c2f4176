"""Link-context learning: conversations that teach the name of a class by a few labeled images (arXiv 2308.07891)."""
