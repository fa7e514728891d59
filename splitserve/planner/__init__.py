"""From objectives, a workload and machines to a placement: simulator, search, plan file, report."""
