"""Serving: continuous batching of requests, the HTTP server around it, and its chat page."""
