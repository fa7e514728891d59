"""A worker whose engine spans machines: how its processes, one on each, find and watch each other.

    node 0   LeaderEnd ── TCP, CURVE ── FollowerEnd   node 1, 2, ...
             roll.py: who has joined

No node loads its model before all have joined with the same settings. From then on they are one: whichever ends, all
end, and are started anew together. What the engine's ranks compute together is the engine's own affair and traffic.
"""
