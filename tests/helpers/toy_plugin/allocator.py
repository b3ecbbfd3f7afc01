"""Later layers are sparser."""

from dataclasses import dataclass

import prunus


@prunus.register_allocator
@dataclass(frozen=True)
class FirstDense(prunus.Allocator):
    """Sparsities grow from layer to layer."""

    name = "toy_first_dense"

    spread: float = 0.2
    """how far the first and the last layer are from the mean, relative to it"""

    def allocate(self, problem):
        last = max(1, len(problem.units) - 1)
        places = [2 * i / last - 1 for i in range(len(problem.units))]
        return prunus.filled(problem, [1 + self.spread * place for place in places])
