"""Ways to hand a prompt's KV over, compared on one machine."""
