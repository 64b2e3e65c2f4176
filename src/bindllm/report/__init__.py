"""The report of a run: an HTML page and its figures."""
