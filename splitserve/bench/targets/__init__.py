"""Whom the load generator sends to: a router, an OpenAI-compatible server, or one worker. `address` says which."""
