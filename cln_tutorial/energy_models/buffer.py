"""Persistent chains: one tensor that remembers where each chain was.

Source: article 6612; Tieleman 2008 (persistent contrastive divergence); Du & Mordatch 2019.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Int, Shaped
from torch import Tensor

from cln_tutorial.energy_models._checks import choose_seed, require_count

Init = Callable[[int, torch.Generator], Tensor]


class ReplayBuffer:
    """The states of many chains in one preallocated tensor.

    ``sample`` gives the states of some chains, a few of them started afresh; ``update`` writes
    them back after the sampler has moved them.

    Args:
        capacity: number of chains.
        event_shape: shape of one state.
        reinit_prob: chance of a chain that is handed out to start afresh.
        init: fresh states, "uniform" in [0, 1) or a function of their number and a generator, as
            the ``sample`` of an exact energy. It fills the buffer, too.
        dtype: of the states, floating.
        device: where they lie.
        policy: "inplace" writes a chain back to its own row, so that each one goes on. "ring"
            writes over the rows that are oldest, so that earlier states stay for a while.
        generator: the key of the buffer's own generator is drawn from it; from the global one if
            there is neither this nor a ``seed``.
        seed: the key itself.

    Raises:
        TypeError: for a dtype that is not floating, or fresh states of another one.
        ValueError: for a capacity below 1, an empty event, a probability outside of [0, 1], an
            unknown policy, or fresh states of another shape.

    Source:
        Article 6612: 95 % of the chains go on, 5 % start from uniform noise.

    Example:
        >>> buffer = ReplayBuffer(1000, (2,), reinit_prob=0.0, seed=0)
        >>> x, rows = buffer.sample(64)
        >>> buffer.update(rows, x + 1)  # a sampler moves them
        >>> bool((buffer.states[rows] == x + 1).all())
        True
    """

    def __init__(
        self,
        capacity: int,
        event_shape: Sequence[int],
        *,
        reinit_prob: float | int = 0.05,
        init: str | Init = "uniform",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        policy: str = "inplace",
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ):
        require_count("capacity", capacity, 1)
        self.event_shape = tuple(event_shape)
        if not self.event_shape or min(self.event_shape) < 1:
            raise ValueError(f"`event_shape` must have a coordinate; got {self.event_shape}.")
        if not 0 <= reinit_prob <= 1:
            raise ValueError(f"`reinit_prob` must be in [0, 1]; got {reinit_prob}.")
        if not dtype.is_floating_point:
            raise TypeError(f"`dtype` must be floating; got {dtype}.")
        if policy not in ("inplace", "ring"):
            raise ValueError(f"`policy` must be 'inplace' or 'ring'; got {policy!r}.")
        if init != "uniform" and not callable(init):
            raise ValueError(f"`init` must be 'uniform' or a function; got {init!r}.")
        self.capacity, self.reinit_prob = capacity, reinit_prob
        self.init, self.policy = init, policy
        self.generator = torch.Generator(torch.empty(0, device=device).device)
        self.generator.manual_seed(choose_seed(seed, generator))
        self.position = 0  # the oldest row
        self.states = torch.empty(capacity, *self.event_shape, dtype=dtype, device=device)
        self.states.copy_(self.fresh(capacity))

    def __len__(self) -> int:
        return self.capacity

    def fresh(self, n: int) -> Tensor:
        """Return ``n`` states that no chain has visited, ``(n, *event)``.

        Raises:
            TypeError: if ``init`` gives another dtype.
            ValueError: if it gives another shape.
        """
        shape, dtype = (n, *self.event_shape), self.states.dtype
        if self.init == "uniform":
            return torch.rand(
                shape, generator=self.generator, dtype=dtype, device=self.states.device
            )
        x = self.init(n, self.generator)
        self._require_states("the states of `init`", x, n)
        return x.detach()

    def sample(self, n: int) -> tuple[Tensor, Int[Tensor, " n"]]:
        """Return the states of ``n`` different chains, ``(n, *event)``, and their rows, ``(n,)``.

        The states are a copy. What started afresh gets into the buffer by ``update`` only.

        Raises:
            ValueError: if there are fewer chains, or ``n`` is below 0.
        """
        require_count("n", n)
        if n > self.capacity:
            raise ValueError(f"`n` must be at most the capacity {self.capacity}; got {n}.")
        device = self.states.device
        rows = torch.randperm(self.capacity, generator=self.generator, device=device)[:n].clone()
        x = self.states.index_select(0, rows)
        if self.reinit_prob:
            chance = torch.rand(n, generator=self.generator, device=device)
            (again,) = torch.nonzero(chance < self.reinit_prob, as_tuple=True)
            if len(again):
                x.index_copy_(0, again, self.fresh(len(again)))
        return x, rows

    def update(self, rows: Int[Tensor, " n"], x: Shaped[Tensor, "..."]) -> None:
        """Write back where the chains are now.

        Args:
            rows: what ``sample`` gave, ``(n,)``. A "ring" takes their number only.
            x: the states, ``(n, *event)``, in the dtype of the buffer. They are copied, without
                their graph.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, more states than rows, a row that does not exist, or one
                that stands twice (both are not checked on an accelerator, where it had to wait).
        """
        self._require_states("`x`", x, len(rows))
        if len(rows) > self.capacity:
            raise ValueError(
                f"`x` must have at most {self.capacity} states, the capacity; got {len(rows)}."
            )
        if self.policy == "ring":
            device = self.states.device
            rows = torch.arange(self.position, self.position + len(x), device=device)
            rows %= self.capacity
            self.position = (self.position + len(x)) % self.capacity
        elif rows.device.type == "cpu" and len(rows):
            ranked = rows.sort().values
            if ranked[0] < 0 or ranked[-1] >= self.capacity:
                raise ValueError(
                    f"`rows` must lie in [0, {self.capacity}); got {int(ranked[0])} to "
                    f"{int(ranked[-1])}."
                )
            if bool((ranked[1:] == ranked[:-1]).any()):
                raise ValueError("`rows` must differ: a chain has one state, not two.")
        with torch.no_grad():
            self.states.index_copy_(0, rows, x.detach())

    def state_dict(self) -> dict[str, Any]:
        """Return a copy of all that a later run needs to go on with the same bits."""
        return {
            "states": self.states.clone(),
            "position": self.position,
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what ``state_dict`` gave.

        Raises:
            KeyError: if a part is missing.
            TypeError: if the states are of another dtype.
            ValueError: if they are of another shape.
        """
        states, position, generator = (state[k] for k in ("states", "position", "generator"))
        self._require_states("the states", states, self.capacity)
        self.states.copy_(states)
        self.position = position
        self.generator.set_state(generator.cpu())

    def _require_states(self, name: str, x: Tensor, n: int) -> None:
        if not isinstance(x, Tensor) or x.dtype != self.states.dtype:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be of the buffer's {self.states.dtype}; got {got}.")
        if x.shape != (n, *self.event_shape):
            raise ValueError(
                f"{name} must have shape {(n, *self.event_shape)}; got {tuple(x.shape)}."
            )
