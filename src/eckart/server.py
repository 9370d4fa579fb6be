"""Serves a model by transformers' OpenAI-compatible server, which knows factored folders once eckart is imported."""

from __future__ import annotations

import socket
from typing import Any

import huggingface_hub.constants
import transformers
from transformers.utils.import_utils import is_serve_available

from eckart.checkpoint import load_tokenizer, locate
from eckart.errors import EckartError, ModelError


def serve(source: str, *, host: str = "127.0.0.1", port: int = 8000, device: str = "auto", dtype: str = "auto") -> None:
    """Answer `/v1/completions`, `/v1/chat/completions`, `/v1/models` and `/health` until interrupted.

    Chats need a chat template beside the tokenizer. There is no password: whoever reaches the port may ask.

    Args:
        source: A folder, dense or factored, or a hub id. It is the model's name in requests, too.
        host: Address to listen at; the default is reached from this machine only.
        port: From 1 to 65535.
        device: As for `eckart.load`.
        dtype: As for `eckart.load`.

    Raises:
        EckartError: A package is missing, the address is taken, or the model cannot be served.
    """
    if not is_serve_available():
        raise EckartError(
            "Serving needs the packages fastapi, uvicorn and openai. They are an extra of eckart's. "
            "Install them with: pip install 'eckart[serve]'"
        )
    name, local, where = locate(source, device=device, dtype=dtype)
    if "@" in name:
        raise ModelError(
            f"{name} has an @ in its name. transformers' server reads what follows it as a revision. Rename the folder."
        )
    _check_free(host, port)
    load_tokenizer(source)
    if local:
        # A request could make the server fetch another model.
        huggingface_hub.constants.HF_HUB_OFFLINE = True
    if dtype == "auto" and where.type == "cpu":
        config: Any = transformers.AutoConfig.from_pretrained(name, local_files_only=local, trust_remote_code=False)
        dtype = "float32" if config.dtype is not None and config.dtype.itemsize < 4 else "stored"

    from transformers.cli.serve import Serve

    Serve(name, host=host, port=port, device=str(where), dtype="auto" if dtype == "stored" else dtype)


def _check_free(host: str, port: int) -> None:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, OverflowError) as error:
        raise EckartError(
            f"Nothing can listen at {host}, port {port}: {error}. It takes an address of this machine and a port that "
            "no other program has. Change --host or --port."
        ) from None
