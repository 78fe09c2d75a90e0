"""Which WebUI this is, by what it can do and not by what it calls itself."""

from __future__ import annotations

import importlib.util
import sys

from lib_dynfuse.hosts.base import Host, Unsupported


def detect() -> Host:
    """The host that this process runs in. Raises Unsupported that names what is missing."""
    if importlib.util.find_spec("modules_forge") is not None:
        raise Unsupported("Forge is not supported yet")
    networks = sys.modules.get("networks")
    if networks is None:
        raise Unsupported("the WebUI's own Lora extension is not there; is it switched off?")
    from lib_dynfuse.hosts.a1111 import Automatic1111

    return Automatic1111(networks)
