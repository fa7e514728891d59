"""Whether separating prefill from decode serves more requests in time: real engines, three shapes, a grid of SLOs."""
