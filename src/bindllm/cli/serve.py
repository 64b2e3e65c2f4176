"""``bindllm serve``: an OpenAI-compatible server for a checkpoint (docs/serve.md)."""

from __future__ import annotations

import ipaddress
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse.typing import NonNegativeInt

from bindllm.cli.arguments import refuse_together
from bindllm.cli.generate import LoadCacheOptions, ModelOptions, load_with_cache
from bindllm.errors import UsageError, needs_extra
from bindllm.media.limits import MediaLimits
from bindllm.serving.config import LOOPBACK, Limits, ServeConfig, read_keys
from bindllm.serving.fetch import FetchConfig


@dataclass(frozen=True)
class AccessOptions:
    """Access (docs/serve.md; default: only programs of this machine)."""

    host: str = "127.0.0.1"
    """address to listen at; another one than that of this machine needs API keys"""
    port: NonNegativeInt = 8000
    """port to listen at; 0: a free one"""
    api_keys: str | None = None
    """file with API keys, one on each line; keys in the environment variable BINDLLM_API_KEYS count too"""
    allowed_hosts: tuple[str, ...] = ()
    """further name of this server in the Host header, such as that of a proxy; may be repeated"""
    ssl_certfile: str | None = None
    """PEM file with a certificate and its chain, for https"""
    ssl_keyfile: str | None = None
    """PEM file with the key of the certificate, if it is not in the same file"""

    @property
    def is_local(self) -> bool:
        """Whether only programs of this machine can connect."""
        try:
            return self.host == "localhost" or ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def serve(
    checkpoint: str,
    *,
    name: str | None = None,
    access: AccessOptions = AccessOptions(),
    limits: Limits = Limits(),
    media_: MediaLimits = MediaLimits(),
    download_: FetchConfig = FetchConfig(),
    cache: LoadCacheOptions = LoadCacheOptions(),
    model: ModelOptions = ModelOptions(),
    overrides: Sequence[str] = (),
) -> int:
    """Serve a checkpoint: a chat page, and OpenAI's API under /v1 for programs.

    Needs pip install 'bindllm[serve]'. SIGTERM and Ctrl-C finish what
    runs; a second Ctrl-C ends at once.

    Args:
        checkpoint: folder that bindllm fit wrote
        name: name of the model in the API (default: that of the folder)

    Example:
        bindllm serve checkpoints/scenes
    """
    refuse_together(cache=cache.cache, no_cache=cache.no_cache)
    _check_installed()
    from bindllm.serving.app import build_app
    from bindllm.serving.engine import Engine
    from bindllm.serving.server import bind, run

    # Mistakes of the command line first: loading a large model takes minutes.
    config = _read_config(name or Path(checkpoint).resolve().name, access, limits, download_)
    certificate = _read_certificate(access)
    bound = bind(access.host, access.port)
    _start_log()
    loaded = load_with_cache(checkpoint, model, cache, overrides)
    sizes = {
        "slots": limits.slots,
        "queue": limits.queue,
        "tokens": limits.kv_tokens,
        "prefill": limits.prefill,
    }
    engine = Engine(loaded, **sizes, limits=media_)
    run(
        build_app(engine, config),
        engine,
        bound,
        drain=limits.drain,
        name=config.model,
        certificate=certificate,
    )
    return 0


def _check_installed() -> None:
    with needs_extra("fastapi, uvicorn or prometheus-client", extra="serve", purpose="serve a model"):
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401


def _start_log() -> None:
    from bindllm.serving.server import LogFormatter

    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter("%(asctime)s %(message)s"))
    # The root, so that entries of libraries are escaped too.
    logging.getLogger().addHandler(handler)
    logging.getLogger("bindllm").setLevel(logging.INFO)


def _read_config(name: str, access: AccessOptions, limits: Limits, fetch: FetchConfig) -> ServeConfig:
    """Return the limits of the server.

    Raises:
        UsageError: other machines could connect without an API key.
        InputError: a file of API keys that cannot be used.
    """
    config = ServeConfig(
        model=name,
        keys=read_keys(access.api_keys),
        hosts=_hosts(access),
        fetch=fetch,
        **vars(limits),
    )
    if not access.is_local and not config.keys:
        raise UsageError(
            f"--host {access.host} lets other machines connect, which needs API keys: give --api_keys FILE, with one "
            "key on each line (python -c 'import secrets; print(secrets.token_urlsafe(32))' makes one)"
        )
    return config


def _read_certificate(access: AccessOptions) -> tuple[str, str | None] | None:
    """Return the files of the certificate and its key, or None: plain HTTP.

    Raises:
        UsageError: they cannot be read, or do not belong together.
    """
    if access.ssl_certfile is None:
        if access.ssl_keyfile is not None:
            raise UsageError("--ssl_keyfile needs a certificate: give --ssl_certfile FILE")
        return None
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            access.ssl_certfile, access.ssl_keyfile
        )
    except OSError as error:
        raise UsageError(
            f"--ssl_certfile {access.ssl_certfile} cannot be used with its key ({error}); both are PEM files, and the "
            "key is in --ssl_keyfile or in the same file"
        ) from error
    return access.ssl_certfile, access.ssl_keyfile


def _hosts(access: AccessOptions) -> tuple[str, ...]:
    """Return the names that the Host header may have; none: any."""
    if not (access.is_local or access.allowed_hosts):
        return ()
    # The address of this machine that it listens at may be a further one, such as 127.0.0.2.
    own = f"[{access.host}]" if ":" in access.host else access.host
    return tuple(dict.fromkeys((*LOOPBACK, own, *access.allowed_hosts)))
