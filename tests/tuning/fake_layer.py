"""A layer that is not there: times and outputs are made up."""


class FakeLayer:
    """`moe_jax.tuning.search.Layer` with given times.

    Args:
        up, down: microseconds of a projection's kernel, given its configuration.
        refused: plans that cannot be built.
        wrong: plans with another output.
        raises: plans that cannot be run.
        overhead: of the layer beside its projections, given the plan.
    """

    def __init__(
        self,
        up,
        down,
        refused=lambda plan: False,
        wrong=lambda plan: False,
        raises=lambda plan: False,
        overhead=lambda plan: 10.0,
    ):
        self.up, self.down, self.refused, self.wrong = up, down, refused, wrong
        self.raises, self.overhead = raises, overhead
        self.built, self.stacks, self.timed = set(), set(), []

    def build(self, plans, stacks=False):
        self.built |= set(plans)
        if stacks:
            self.stacks |= set(plans)
        return {plan: "cannot be built: too wide" for plan in plans if self.refused(plan)}

    def fingerprint(self, plan):
        assert plan in self.built
        if self.raises(plan):
            raise RuntimeError("too many registers")
        return "other bits" if self.wrong(plan) else "the bits"

    def kernel_us(self, plan):
        assert plan in self.built
        return self.up(plan.up), self.down(plan.down)

    def layer_us(self, plan):
        assert plan in self.stacks
        self.timed.append(plan)
        return self.up(plan.up) + self.down(plan.down) + self.overhead(plan)
