"""Converters of published weights to bindllm's own folders, and their settings (which import nothing heavy)."""

KINDS = ("imagebind", "pointbind", "imagebind-llm")
TOKENIZER = "checkpoints/clip-vocabulary/tokenizer.json"
"""Where ``bindllm fetch clip-vocabulary`` puts CLIP's tokenizer."""
