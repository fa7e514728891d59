"""OpenAI-compatible HTTP in front of a router, in its process or in one of its own."""
