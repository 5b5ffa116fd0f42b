"""Samplers that run many chains at once on any energy: Langevin, MALA, and underdamped Langevin.

All noise is a function of (seed, step, chain), so a run can be cut into chunks of chains or of
steps without a change. Source: articles 6612 and 6331; Roberts & Tweedie 1996; Leimkuhler &
Matthews 2013.
"""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from cln_tutorial.energy_models._chains import (
    Backend,
    DualAveraging,
    Nonfinite,
    Run,
    SampleOutput,
)
from cln_tutorial.energy_models._checks import (
    Energy,
    frozen,
    require_count,
    require_positive,
)
from cln_tutorial.energy_models.fused import run as run_fused
from cln_tutorial.energy_models.fused import supports
from cln_tutorial.energy_models.steps import (
    PerChain,
    State,
    baoab_kick,
    baoab_move,
    choose,
    langevin_step,
    mala_accept,
    mala_log_ratio,
    mala_proposal,
    matched_noise_scale,
    to_chains,
)

VELOCITIES = 2  # the stream of the first velocities; 0 is that of the steps, 1 of acceptance
BEST_MALA_RATE = 0.574  # in high dimension, Roberts & Rosenthal 1998
_warned: set[str] = set()


def effective_temperature(step_size: PerChain, noise_scale: PerChain) -> PerChain:
    r"""Return the temperature that a Langevin chain samples for small steps: :math:`s^2 / (2h)`.

    Args:
        step_size: ``h``, above 0; a number or ``(n,)``.
        noise_scale: ``s``, the standard deviation of the noise, at least 0; a number or ``(n,)``.

    Returns:
        A number, or ``(n,)``.

    Raises:
        ValueError: if one is negative or not finite, or the step is 0.

    Source:
        The paper behind article 6612 (Du & Mordatch 2019) takes ``s = 0.005`` and, for CIFAR-10,
        a gradient step of 10.

    Example:
        >>> f"{effective_temperature(10, 0.005):.3g}"
        '1.25e-06'
    """
    require_positive("step_size", step_size)
    require_positive("noise_scale", noise_scale, zero=True)
    return noise_scale**2 / (2 * step_size)


def langevin_sample(
    energy: Energy,
    x0: Float[Tensor, "n *event"],
    step_size: PerChain,
    n_steps: int,
    noise_scale: float | int | None = None,
    *,
    temperature: PerChain = 1.0,
    preconditioner: Shaped[Tensor, "..."] | None = None,
    grad_clip: float | int | None = None,
    bounds: tuple[float | int, float | int] | None = None,
    reflect: bool = False,
    fixed: Bool[Tensor, "*event"] | None = None,
    nonfinite: Nonfinite = "raise",
    thin: int = 1,
    return_trajectory: bool = False,
    return_info: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "n *event"] | SampleOutput:
    r"""Run unadjusted Langevin dynamics: :math:`x' = x - hP\nabla E(x) + s P^{1/2}\xi`.

    With the matched noise :math:`s = \sqrt{2hT}` its law is :math:`e^{-E/T}` up to O(h): on
    :math:`N(0, \sigma^2)` the variance is :math:`\sigma^2/(1 - h/2\sigma^2)`, and from
    :math:`h = 2\sigma^2` on there is none.

    Args:
        energy: from points ``(n, *event)`` to energies ``(n,)`` or ``(n, 1)``: a function, a
            network, or a closed form that brings ``grad(x)``. The chains never interact, so it
            must treat each point alone. It sees float32 where ``x0`` is of a half type, unless it
            is a network whose parameters are of a half type.
        x0: where the chains start, ``(n, *event)``, floating; not modified. Half types are held
            in float32 inside: a drift below half a rounding step would be lost.
        step_size: ``h``, above 0; a number, or one per chain ``(n,)``.
        n_steps: how many steps; 0 returns a copy.
        noise_scale: ``s``, the standard deviation of the noise; None is the matched one. Another
            one samples another temperature, and a warning names it.
        temperature: ``T``, above 0; a number, or one per chain ``(n,)``.
        preconditioner: ``P``, symmetric positive definite ``(d, d)`` over the flattened event, or
            a diagonal ``(d,)``.
        grad_clip: clamp each entry of the gradient to this size. It changes the law: where it
            binds, the energy acts as if it were linear.
        bounds: ``(low, high)``, the box of all coordinates. What leaves it is put on its face,
            which changes the law: the faces get atoms.
        reflect: reflect at the faces instead, which keeps the law inside the box to
            :math:`O(\sqrt h)`.
        fixed: boolean mask of the event's shape: True stays as it is in ``x0``, and the rest is
            sampled conditionally on it.
        nonfinite: what a gradient that is not finite does: "raise" within 64 steps (or after
            the loop of numba), "reject" the step that led there, or "ignore" it. It is counted in
            the info.
        thin: keep one state of ``thin``; must divide ``n_steps``.
        return_trajectory: return a :class:`SampleOutput` with the states kept.
        return_info: return a :class:`SampleOutput` with a :class:`SampleInfo`.
        seed: key of the noise, at least 0.
        generator: draws the seed, once; without both the global one does.
        first_chain: the number of the first chain: chains 0..n in one call are chains 0..k in one
            and k..n in another.
        first_step: the number of the first step: ``n`` steps and ``m`` more from
            ``first_step=n`` are ``n + m`` steps.
        chunk_size: evaluate the energy on so many points at once.
        backend: "reference" is PyTorch; "numba" does all steps in one loop, for closed forms of
            this chapter on a CPU; "auto" takes it where it can.

    Returns:
        The last states ``(n, *event)``, or a :class:`SampleOutput`; detached, of dtype and device
        of ``x0``.

    Raises:
        TypeError: if the energy cannot be called, or ``x0`` is not floating.
        ValueError: for a step or temperature that is not positive, both ``noise_scale`` and a
            temperature, both ``seed`` and ``generator``, a matrix that is not positive definite,
            an energy of another shape, or a backend that cannot do it.
        DivergenceError: for a gradient that is not finite.

    Source:
        Article 6612, in its letters ``eps = 2 h``; Roberts & Tweedie 1996.

    Example:
        >>> from cln_tutorial.energy_models.samplers import langevin_sample
        >>> energy = lambda x: x.square().sum(1) / 2
        >>> x = langevin_sample(energy, torch.zeros(4000, 1), step_size=0.5, n_steps=30, seed=0)
        >>> bool((x.var() - 4 / 3).abs() < 0.15)  # sigma^2 / (1 - h / 2)
        True
    """
    run = Run.checked(
        energy,
        x0,
        n_steps,
        thin,
        seed,
        generator,
        first_chain,
        first_step,
        return_trajectory,
        return_info,
        chunk_size,
        nonfinite,
    )
    h, t = run.per_chain("step_size", step_size), run.per_chain("temperature", temperature)
    s = _noise_scale(h, noise_scale, t)
    p = run.preconditioner(preconditioner, fixed)
    if grad_clip is not None:
        require_positive("grad_clip", grad_clip)
    _require_bounds(bounds, reflect)
    plain = p is None and grad_clip is None and bounds is None and nonfinite != "reject"
    if _numba_serves(backend, run, "ula", plain):
        return _run_fused("ula", run, h, noise_scale=s)
    if run.is_idle:
        return run.output(run.x, h)
    x = run.x
    with torch.no_grad(), frozen(energy):
        e, g = run.start(x)
        for step in range(n_steps):
            drift = g if grad_clip is None else g.clamp(-grad_clip, grad_clip)
            noise = run.noise(step)
            if p is not None:
                drift, noise = p.drift(drift), p.noise(noise)
            moved = _into_box(langevin_step(x, drift, noise, h, s), bounds, reflect)
            if fixed is not None:
                moved = torch.where(fixed, x, moved)
            new = (moved, e, g)
            # Nobody needs the energy of the last state, unless it is kept or may be rejected.
            if step + 1 < n_steps or return_info or nonfinite == "reject":
                needed = return_info or nonfinite == "reject"
                new = (moved, *run.evaluate(moved, needs_energy=needed))
                finite = run.count_finite(*new[1:])
                if nonfinite == "reject":
                    new = choose(finite, new, (x, e, g))
                    run.taken += finite.to(run.taken)
            x, e, g = new
            run.keep(step, x, e)
        if nonfinite != "reject":
            run.taken += n_steps
        return run.output(x, h)


def mala_sample(
    energy: Energy,
    x0: Float[Tensor, "n *event"],
    step_size: PerChain,
    n_steps: int,
    *,
    temperature: PerChain = 1.0,
    preconditioner: Shaped[Tensor, "..."] | None = None,
    target_accept: float | None = None,
    n_adapt: int = 0,
    bounds: tuple[float | int, float | int] | None = None,
    fixed: Bool[Tensor, "*event"] | None = None,
    thin: int = 1,
    return_trajectory: bool = False,
    return_info: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "n *event"] | SampleOutput:
    r"""Run Langevin dynamics with an accept step, which makes :math:`e^{-E/T}` exact (MALA).

    A step proposes :math:`x' = x - hP\nabla E(x) + \sqrt{2hT}P^{1/2}\xi` and takes it with
    probability :math:`\min(1, a)`,

    .. math:: a = \frac{p(x')\,q(x|x')}{p(x)\,q(x'|x)},\qquad q(x'|x) = N(x - hP\nabla E(x), 2hTP).

    On N(0, 1) the rate of acceptance is :math:`1 - \frac2\pi \arctan (h/2)^{3/2}`.

    Args:
        energy: as in :func:`langevin_sample`; infinite outside its support. Proposals whose
            energy or gradient is not finite are rejected, and counted in the info.
        x0: where the chains start, ``(n, *event)``, floating, inside the support; not modified.
        step_size: ``h``, above 0; a number, or one per chain ``(n,)``. With ``n_adapt`` only the
            first guess.
        n_steps: how many steps; 0 returns a copy, after a warm-up if there is one.
        temperature: ``T``, above 0; a number, or one per chain ``(n,)``.
        preconditioner: ``P``, symmetric positive definite ``(d, d)`` over the flattened event, or
            a diagonal ``(d,)``. It changes how fast the chains mix, never what they sample.
        target_accept: the rate of acceptance that the warm-up aims at; .574 if None.
        n_adapt: steps of warm-up before the ``n_steps``, in which dual averaging moves the step;
            then it stays. One number for ``step_size`` moves by the mean over all chains, so the
            chains do interact; one per chain moves by its own.
        bounds: ``(low, high)``, the box of all coordinates: proposals outside are rejected, which
            samples the law inside the box exactly.
        fixed: boolean mask of the event's shape: True stays as it is in ``x0``.
        thin: as in :func:`langevin_sample`, as is all that follows.
        return_trajectory: return a :class:`SampleOutput` with the states kept.
        return_info: return a :class:`SampleOutput` with a :class:`SampleInfo`.
        seed: key of the noise, at least 0.
        generator: draws the seed, once; without both the global one does.
        first_chain: the number of the first chain.
        first_step: the number of the first step, that of the warm-up if there is one.
        chunk_size: evaluate the energy on so many points at once.
        backend: "reference", "numba" or "auto".

    Returns:
        The last states ``(n, *event)``, or a :class:`SampleOutput`; detached, of dtype and device
        of ``x0``.

    Raises:
        TypeError: if the energy cannot be called, or ``x0`` is not floating.
        ValueError: as :func:`langevin_sample`, and for a ``target_accept`` outside (0, 1) or
            without a warm-up.
        DivergenceError: if energy or gradient is not finite where a chain starts.

    Source:
        Roberts & Tweedie 1996; Hoffman & Gelman 2014 for the warm-up. Article 6331 gives the
        density of the proposal without the half of its drift.

    Example:
        >>> from cln_tutorial.energy_models.samplers import mala_sample
        >>> energy = lambda x: x.square().sum(1) / 2
        >>> out = mala_sample(energy, torch.zeros(4000, 1), 1.0, 50, seed=0, return_info=True)
        >>> bool((out.x.var() - 1).abs() < 0.12)
        True
        >>> bool((out.info.accept_rate.mean() - 0.7837).abs() < 0.01)
        True
    """
    run = Run.checked(
        energy,
        x0,
        n_steps,
        thin,
        seed,
        generator,
        first_chain,
        first_step,
        return_trajectory,
        return_info,
        chunk_size,
        "reject",
    )
    h, t = run.per_chain("step_size", step_size), run.per_chain("temperature", temperature)
    p = run.preconditioner(preconditioner, fixed)
    _require_bounds(bounds, False)
    require_count("n_adapt", n_adapt)
    if target_accept is not None and not (n_adapt and 0 < target_accept < 1):
        raise ValueError(
            f"`target_accept` must be inside (0, 1) and needs a warm-up, n_adapt > 0; "
            f"got target_accept={target_accept}, n_adapt={n_adapt}."
        )
    if bounds is not None and bool(_outside(run.x, bounds).any()):
        raise ValueError(f"`x0` must lie inside `bounds` {bounds}: no step leads in.")
    serves = _numba_serves(backend, run, "mala", p is None and bounds is None)
    if serves and not n_adapt:
        return _run_fused("mala", run, h, temperature=t)
    if run.x.shape[0] == 0 or n_steps + n_adapt == 0:
        return run.output(run.x, h)

    def propose(step: int, old: State, h: PerChain) -> State:
        x = mala_proposal(old[0], old[2], run.noise(step), h, t, p)
        e, g = run.evaluate(x)
        run.count_finite(e, g)
        return x, e if bounds is None else e.masked_fill(_outside(x, bounds), math.inf), g

    with torch.no_grad(), frozen(energy):
        state = (run.x, *run.start(run.x))
        if n_adapt:
            adapt = DualAveraging(h, BEST_MALA_RATE if target_accept is None else target_accept)
            for step in range(n_adapt):
                h, old = adapt.step_size, state
                new = propose(step, old, h)
                state, _ = mala_accept(old, new, run.uniform(step), h, t, p)
                adapt.update(mala_log_ratio(*old, *new, h, t, p))
            h, run.x, run.first_step = adapt.found(), state[0], run.first_step + n_adapt
            if serves:
                return _run_fused("mala", run, h, temperature=t)
        for step in range(n_steps):
            new = propose(step, state, h)
            state, accepted = mala_accept(state, new, run.uniform(step), h, t, p)
            run.taken += accepted
            run.keep(step, *state[:2])
        return run.output(state[0], h)


def underdamped_langevin_sample(
    energy: Energy,
    x0: Float[Tensor, "n *event"],
    step_size: PerChain,
    n_steps: int,
    friction: float | int = 1.0,
    *,
    temperature: PerChain = 1.0,
    v0: Float[Tensor, "n *event"] | None = None,
    nonfinite: Nonfinite = "raise",
    thin: int = 1,
    return_trajectory: bool = False,
    return_info: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    first_chain: int = 0,
    first_step: int = 0,
    chunk_size: int | None = None,
    backend: Backend = "auto",
) -> Float[Tensor, "n *event"] | SampleOutput:
    r"""Run Langevin dynamics with velocities, split as BAOAB.

    .. math:: dx = v\,dt, \qquad dv = -\nabla E\,dt - \gamma v\,dt + \sqrt{2\gamma T}\,dW

    The positions follow :math:`e^{-E/T}`, with mass 1. On a harmonic well of stiffness ``k`` their
    variance is exactly ``T / k`` for every stable step, :math:`h < 2/\sqrt k`; that of the
    velocities is :math:`T(1 - kh^2/4)`.

    Args:
        energy: as in :func:`langevin_sample`.
        x0: where the chains start, ``(n, *event)``, floating; not modified.
        step_size: ``h``, a time here: it compares with the root of an overdamped step. Above 0, a
            number or one per chain ``(n,)``.
        n_steps: how many steps; 0 returns a copy.
        friction: ``gamma``, at least 0; 0 keeps the total energy and forgets nothing.
        temperature: ``T``, above 0; a number, or one per chain ``(n,)``.
        v0: first velocities, shape of ``x0``; None draws them from N(0, T).
        nonfinite: "raise" within 64 steps, or "ignore".
        thin: as in :func:`langevin_sample`, as is all that follows.
        return_trajectory: return a :class:`SampleOutput` with the states kept.
        return_info: return a :class:`SampleOutput` with a :class:`SampleInfo`, which has the last
            velocities.
        seed: key of the noise, at least 0.
        generator: draws the seed, once; without both the global one does.
        first_chain: the number of the first chain.
        first_step: the number of the first step.
        chunk_size: evaluate the energy on so many points at once.
        backend: "reference", "numba" or "auto".

    Returns:
        The last states ``(n, *event)``, or a :class:`SampleOutput`; detached, of dtype and device
        of ``x0``.

    Raises:
        TypeError: if the energy cannot be called, or ``x0`` is not floating.
        ValueError: as :func:`langevin_sample`, and for a negative friction.
        DivergenceError: for a gradient that is not finite.

    Source:
        Leimkuhler & Matthews 2013.

    Example:
        >>> from cln_tutorial.energy_models.samplers import underdamped_langevin_sample
        >>> energy = lambda x: x.square().sum(1) / 2
        >>> x = underdamped_langevin_sample(energy, torch.zeros(4000, 1), 1.5, 30, seed=0)
        >>> bool((x.var() - 1).abs() < 0.12)  # 5 standard errors
        True
    """
    if nonfinite == "reject":
        raise ValueError(
            "`nonfinite` must be raise or ignore: a step with velocities has no way back."
        )
    run = Run.checked(
        energy,
        x0,
        n_steps,
        thin,
        seed,
        generator,
        first_chain,
        first_step,
        return_trajectory,
        return_info,
        chunk_size,
        nonfinite,
    )
    h, t = run.per_chain("step_size", step_size), run.per_chain("temperature", temperature)
    require_positive("friction", friction, zero=True)
    if v0 is None:
        v = to_chains(matched_noise_scale(0.5, t), run.x) * run.noise(0, VELOCITIES)
    elif v0.shape != x0.shape:
        raise ValueError(
            f"`v0` must have the shape of `x0` {tuple(x0.shape)}; got {tuple(v0.shape)}."
        )
    else:
        v = v0.detach().to(run.x).contiguous()
    if _numba_serves(backend, run, "baoab", True):
        return _run_fused("baoab", run, h, temperature=t, friction=float(friction), v=v)
    if run.is_idle:
        return run.output(run.x, h, v)
    x = run.x
    with torch.no_grad(), frozen(energy):
        e, g = run.start(x)
        for step in range(n_steps):
            x, v = baoab_move(x, v, g, run.noise(step), h, friction, t)
            e, g = run.evaluate(x)
            run.count_finite(e, g)
            v = baoab_kick(v, g, h)
            run.keep(step, x, e)
        run.taken += n_steps
        return run.output(x, h, v)


def _noise_scale(h: PerChain, noise_scale: float | int | None, temperature: PerChain) -> PerChain:
    if noise_scale is None:
        return matched_noise_scale(h, temperature)
    if isinstance(temperature, Tensor) or temperature != 1:
        raise ValueError(
            f"give `noise_scale` or `temperature`, not both: the noise sets the temperature; "
            f"got noise_scale={noise_scale}, temperature={temperature}."
        )
    found = torch.as_tensor(effective_temperature(h, noise_scale))
    off = found.flatten()[(found - 1).abs().argmax()].item() if found.numel() else 1.0
    value = f"{off:.3g}"
    if abs(off - 1) > 0.01 and value not in _warned:  # once in a process for each value
        _warned.add(value)
        warnings.warn(
            f"noise_scale={noise_scale:g} with this step_size has the effective_temperature "
            f"s^2 / 2h = {value}, not 1: the chain samples exp(-E / {value}). Leave `noise_scale` "
            f"out for temperature 1.",
            stacklevel=3,
        )
    return float(noise_scale)


def _require_bounds(bounds: tuple[float | int, float | int] | None, reflect: bool) -> None:
    if bounds is None and reflect:
        raise ValueError("`reflect` needs `bounds`.")
    if bounds is not None and not (
        len(bounds) == 2 and -math.inf < bounds[0] < bounds[1] < math.inf
    ):
        raise ValueError(f"`bounds` must be finite numbers (low, high), low < high; got {bounds}.")


def _into_box(x: Tensor, bounds: tuple[float | int, float | int] | None, reflect: bool) -> Tensor:
    if bounds is None:
        return x
    low, high = bounds
    if not reflect:
        return x.clamp(low, high)
    width = high - low
    folded = high - ((x - low).remainder(2 * width) - width).abs()
    # What is inside keeps all its bits.
    return torch.where((low <= x) & (x <= high), x, folded.clamp(low, high))


def _outside(x: Tensor, bounds: tuple[float | int, float | int]) -> Tensor:
    return ((x < bounds[0]) | (x > bounds[1])).flatten(1).any(1)


def _numba_serves(backend: Backend, run: Run, method: str, plain: bool) -> bool:
    """Tell whether one loop over all steps can do it; raise if it must and cannot."""
    if backend not in ("auto", "reference", "numba"):
        raise ValueError(f"`backend` must be auto, reference or numba; got {backend!r}.")
    if backend == "reference" or not run.x.shape[0]:
        return False
    if plain and supports(run.energy, run.x, method):
        return not run.is_idle
    if backend == "numba":
        raise ValueError(
            "backend='numba' needs numba (extra `fast`), a closed-form energy of this chapter on "
            "a CPU, and no preconditioner, bounds, mask, clip or rejection; "
            "use 'auto' or 'reference'."
        )
    return False


def _run_fused(method: str, run: Run, step_size: PerChain, **options: Any) -> Tensor | SampleOutput:
    out = run_fused(
        method,
        run.energy,
        run.x,
        step_size=step_size,
        n_steps=run.n_steps,
        seed=run.seed,
        first_chain=run.first_chain,
        first_step=run.first_step,
        thin=run.thin,
        keep=run.trajectory or run.info,
        **options,
    )
    run.n_grad += out.n_grad
    run.bad += out.n_nonfinite_start
    if run.nonfinite != "ignore":
        run.raise_if_bad(0)
    run.bad += out.n_nonfinite
    run.taken += out.accepted
    if out.trajectory is not None:
        run.frames, run.energies = out.trajectory, out.energy
    return run.output(out.x, step_size, out.v)
