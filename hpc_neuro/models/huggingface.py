"""The Hugging Face hub with timm's weights: its cache here, and the network. The only importer of its client."""

from __future__ import annotations

import os
import queue
import socket
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache

from hpc_neuro.core.schema import InputError
from hpc_neuro.models import teacher_folder

FILES = ("model.safetensors", "pytorch_model.bin")
"""How repositories name their weights."""
SECONDS = 5.0
"""A hub that does not answer a connection in this time counts as unreachable."""


def weights(name: str, card: Mapping[str, Any]) -> Path:
    """The path of a hub model's weights in the local cache, downloaded first if need be and possible."""
    repository, _, revision = str(card.get("hf_hub_id") or "").partition("@")
    if not repository:
        raise InputError(f"timm knows no hub weights for {name}; {teacher_folder.advice(name)}")

    names = (card["hf_hub_filename"],) if card.get("hf_hub_filename") else FILES

    # The cache is asked first, so that a machine without a network works.
    for file in names:
        cached = try_to_load_from_cache(repository, file, revision=revision or None)
        if isinstance(cached, str):
            return Path(cached)

    # The hub's client retries for minutes before it gives up, so that a reason to fail is looked for first.
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable()
    if reason:
        raise InputError(
            f"the weights of {name} are not in the cache {constants.HF_HUB_CACHE} and {reason}; "
            f"{teacher_folder.advice(name)}"
        )

    # A card need not name the file, so that the usual names are tried in turn.
    for file in names:
        try:
            return Path(hf_hub_download(repository, file, revision=revision or None))
        except (OSError, RuntimeError, ValueError) as error:
            # The hub's errors derive from these.
            reason = line(error)

    raise InputError(
        f"the weights of {name} cannot be downloaded from {repository} ({reason}); {teacher_folder.advice(name)}"
    )


def _unreachable() -> str:
    """Why the hub cannot be reached, or ''. The hub's own client retries for minutes; behind a proxy it must try."""
    # A proxy connects on our behalf, so that a failed connection from here proves nothing.
    if any(os.environ.get(k) for k in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return ""

    url = urlsplit(constants.ENDPOINT)
    host, port = str(url.hostname), url.port or (443 if url.scheme == "https" else 80)

    # Resolving a name has no timeout of its own, so the attempt runs in a thread that the process does not wait for.
    answers: queue.Queue[str] = queue.Queue()
    threading.Thread(target=lambda: answers.put(_connect(host, port)), daemon=True).start()
    try:
        return answers.get(timeout=SECONDS)
    except queue.Empty:
        return f"{host} did not answer within {SECONDS:.0f} s"


def _connect(host: str, port: int) -> str:
    """Why a connection fails; "" if it does not."""
    try:
        socket.create_connection((host, port), timeout=SECONDS).close()
    except OSError as error:
        return f"{host} cannot be reached ({line(error)})"
    return ""


def line(error: BaseException) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split())[:160] or type(error).__name__
