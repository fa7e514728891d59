"""From objectives, a workload and machines to a placement: simulator, search, plan, report. Pure of GPUs and networks."""
