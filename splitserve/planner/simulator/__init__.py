"""Simulates a deployment under a workload, with the router's own choice of workers (`routing/policy`)."""
