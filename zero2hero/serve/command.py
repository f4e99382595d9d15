"""`zero2hero serve MODEL`: listen at once, load the model, answer until SIGTERM or Ctrl-C."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from zero2hero.errors import UserError
from zero2hero.options import ServeConfig

if TYPE_CHECKING:
    from zero2hero.generate.engine import Engine

GRACE_SECONDS = 20  # for answers that are being written when the server is told to stop


def run(config: ServeConfig) -> None:
    """Serve until told to stop."""
    try:
        import uvicorn

        from zero2hero.serve import security
        from zero2hero.serve.app import create_app
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'zero2hero[serve]'") from None
    key, made = security.key_for(config.host, config.api_key or os.environ.get("ZERO2HERO_API_KEY"))
    name = config.served_model_name or Path(config.model).resolve().name
    if name in config.adapters:
        raise UserError(f"'{name}' is the model's name, so no adapter can have it; --served_model_name changes it")
    app = create_app(lambda: load(config), name, key, config.metrics, list(config.adapters))
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http=security.PatientProtocol,
            ws="none",
            loop="asyncio",
            proxy_headers=False,
            server_header=False,
            h11_max_incomplete_event_size=security.HEADER_BYTES,
            limit_concurrency=security.CONNECTIONS,
            timeout_graceful_shutdown=GRACE_SECONDS,
            access_log=False,
            log_level="warning",
        )  # fmt: skip
    )
    worker = app.state.worker
    worker.on_failure = lambda: setattr(server, "should_exit", True)
    with listen(config.host, config.port) as listener:
        print(f"{name}: http://{config.host}:{listener.getsockname()[1]}/v1", flush=True)
        if made:
            print(f"key: {key}", flush=True)
        server.run(sockets=[listener])
    if worker.failure is not None:
        raise worker.failure


def listen(host: str, port: int, waiting: int = 512) -> socket.socket:
    """A socket that accepts connections; port 0 takes a free one."""
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=waiting)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host}:{port}: {error}; --port takes another") from None


def load(config: ServeConfig) -> Engine:
    """The model and its engine; torch is imported here, when the server already listens."""
    from zero2hero import machine
    from zero2hero.generate.engine import Engine
    from zero2hero.language_model import language_model, load_parts, with_adapters
    from zero2hero.models.vision_language import VisionLanguage
    from zero2hero.seeing import seeing_model

    machine.prepare()
    parts = load_parts(
        config.model, config.device, config.dtype, load_in_4bit=config.load_in_4bit, load_in_8bit=config.load_in_8bit
    )
    lm = seeing_model(parts) if isinstance(parts.model, VisionLanguage) else language_model(parts)
    engine = Engine(
        lm, max_batch_size=config.max_batch_size, max_waiting=config.max_waiting,
        adapters=with_adapters(lm, config.adapters),
    )  # fmt: skip
    print("ready", flush=True)
    return engine
