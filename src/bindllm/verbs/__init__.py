"""The verbs of the command line; each file is imported when its verb runs."""
