"""The Python client, async and sync."""

from splitserve.client.asynchronous import AsyncClient
from splitserve.client.calls import Drained, Migrated, Options, Prompt, Retries
from splitserve.client.sync import Client

__all__ = ["AsyncClient", "Client", "Drained", "Migrated", "Options", "Prompt", "Retries"]
