"""Training data larger than the disk: tar shards, read from start to end, embedded on the way, resumed to the bit."""
