"""Pure: what arrives when: lengths, arrivals, traces, shared prefixes. The planner simulates it, `bench` sends it."""
