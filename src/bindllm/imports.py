"""Importing classes by name: which ones a folder may name."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any


def replace_allow(kind: Any, arguments: Mapping[str, Any], allow: Sequence[str]) -> dict[str, Any]:
    """Return constructor arguments with the caller's ``allow`` in place of the file's.

    A file must not extend what its reader allows, so its own value is dropped, whatever its type.

    Args:
        kind: the class to build.
        arguments: the arguments as the file gives them.
        allow: import paths that the caller trusts; passed on if the constructor has a parameter ``allow``.
    """
    kept = {name: value for name, value in arguments.items() if name != "allow"}
    try:
        takes_allow = "allow" in inspect.signature(kind).parameters
    except (TypeError, ValueError):
        # Classes that are not written in Python may have no signature.
        takes_allow = False
    return {**kept, "allow": list(allow)} if takes_allow else kept
