"""Commands for unCLIP pipelines (docs/imagine.md)."""
