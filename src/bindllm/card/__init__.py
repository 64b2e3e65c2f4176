"""Model cards: a checkpoint's parts, licenses, data, results, limits and bill of materials, each from a file."""
