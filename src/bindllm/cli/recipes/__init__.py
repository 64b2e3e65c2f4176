"""Commands that read a recipe: ``bindllm fit``, ``align`` and ``check``, and the reader that they share."""
