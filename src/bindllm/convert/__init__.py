"""Converters of published weights to bindllm's own folders."""
