"""A run of decode steps of an unchanged batch, as one event: each sequence grows by a token per step, so a step's time
is a straight line in the number of steps (exact where the latency model is affine in the context)."""

from math import ceil, sqrt


class Stretch:
    """Steps of an unchanged batch from `began` on: step j, counted from 0, takes `first_s` + j * `more_s` seconds."""

    __slots__ = ("began", "first_s", "more_s", "steps")

    def __init__(self, began: float, steps: int, first_s: float, more_s: float) -> None:
        self.began = began
        self.steps = steps
        self.first_s = first_s
        self.more_s = more_s

    def end_of(self, steps: int) -> float:
        """When so many steps are done."""
        return self.began + steps * (self.first_s + self.more_s * (steps - 1) / 2)

    def steps_by(self, time: float) -> int:
        """How many steps are done at the first boundary not before that time; at least one."""
        elapsed, half = time - self.began, self.more_s / 2
        linear = self.first_s - half
        if half * self.steps < 1e-6 * linear:  # the square root would lose its digits
            steps = elapsed / (linear + half * self.steps)
        else:
            steps = (sqrt(linear * linear + 4 * half * elapsed) - linear) / (2 * half)
        return max(1, min(self.steps, ceil(steps - 1e-9)))
