"""bindllm gives a language model new modalities.

The public names are imported on first use, so that ``import bindllm`` stays instant.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bindllm.cache.visual_cache import VisualCache
    from bindllm.conversation import Conversation, Message
    from bindllm.embeddings.store import EmbeddingStore
    from bindllm.encoders import Encoder
    from bindllm.errors import BindLLMError
    from bindllm.media import Media
    from bindllm.model.bindllm import BindLLM
    from bindllm.shots import Shot
    from bindllm.unclip.imagine import Imagine

__version__ = "0.1.0"

_HOMES = {
    "BindLLM": "bindllm.model.bindllm",
    "BindLLMError": "bindllm.errors",
    "Conversation": "bindllm.conversation",
    "EmbeddingStore": "bindllm.embeddings.store",
    "Encoder": "bindllm.encoders",
    "Imagine": "bindllm.unclip.imagine",
    "Media": "bindllm.media",
    "Message": "bindllm.conversation",
    "Shot": "bindllm.shots",
    "VisualCache": "bindllm.cache.visual_cache",
}

__all__ = [
    "BindLLM",
    "BindLLMError",
    "Conversation",
    "EmbeddingStore",
    "Encoder",
    "Imagine",
    "Media",
    "Message",
    "Shot",
    "VisualCache",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'bindllm' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
