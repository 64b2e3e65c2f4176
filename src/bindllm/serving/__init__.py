"""The OpenAI-compatible server: engine, endpoints and chat page. Needs the extra ``serve``."""
