"""What the load generator itself can do: tokens received per core, and how late it sends."""
