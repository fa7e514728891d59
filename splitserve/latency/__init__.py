"""Pure: what a step costs, behind one protocol. The simulated engine asks it; so will routing and the planner."""
