"""The Python client, async and sync."""

from splitserve.client.asynchronous import AsyncClient
from splitserve.client.calls import Options, Prompt, Retries
from splitserve.client.sync import Client

__all__ = ["AsyncClient", "Client", "Options", "Prompt", "Retries"]
