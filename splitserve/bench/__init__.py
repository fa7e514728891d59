"""Load on a real cluster: open-loop sending and the timelines that come back."""
