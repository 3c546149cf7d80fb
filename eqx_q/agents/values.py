"""Values: interpret a network's raw outputs as returns, and define their loss.

A network outputs `K` numbers per choice. A value turns them into an expected return, into samples
for targets to bootstrap from, and into a loss against such targets.
"""

import abc
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from equinox import AbstractVar
from jax.core import Tracer
from jaxtyping import Array, Float

from ..errors import UnknownNameError, UsageError, check_whole
from ..returns import quantile_huber
from ..types import Scalar as Number
from .hyperparameters import check_ranges
from .parts import Part, make_part

Metrics = dict[str, Float[Array, "*batch"]]


class AbstractValue(Part):
    """Interprets `K` raw numbers as a return, and defines their loss. Its arrays are not trained.

    Shapes: any leading axes, then `K` raw numbers, `L` samples of a target, `F` factors of an
    action.

    **Attributes:** `num_outputs`: `K`; `num_samples`: `L`, 1 if targets use expected returns.
    """

    num_outputs: AbstractVar[int]
    num_samples: AbstractVar[int]

    @abc.abstractmethod
    def expected(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
        """The expected return: the Q-value."""

    @abc.abstractmethod
    def join(self, raw: Float[Array, "*batch F K"]) -> Float[Array, "*batch K"]:
        """Raw numbers of a joint action, from those of its factors' choices.

        Its expected return is the mean over the factors (Seyde et al. 2023, arXiv 2210.12566).
        """

    @abc.abstractmethod
    def of_means(
        self, means: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch J"], "AbstractValue"]:
        """Raw numbers whose expected return is `means`, and the value that interprets them.

        A joint mixer predicts only a mean, not a distribution.
        """

    @abc.abstractmethod
    def samples(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch L"]:
        """Samples of the return, for targets to bootstrap from."""

    @abc.abstractmethod
    def loss(
        self, raw: Float[Array, "*batch K"], targets: Float[Array, "*batch L"]
    ) -> tuple[Float[Array, "*batch"], Metrics]:
        """The loss, averaged over samples of the target, and metrics by name."""


class Scalar(AbstractValue):
    """One number, the expected return itself.

    **Attributes:** `td_loss`: the loss of the TD error: `"half_squared"`, `"squared"`, or `"huber"`
    (with δ = 1).
    """

    num_outputs: ClassVar[int] = 1
    num_samples: ClassVar[int] = 1

    td_loss: str = eqx.field(static=True)

    def __init__(self, td_loss: str = "half_squared"):
        if td_loss not in _TD_LOSSES:
            raise UnknownNameError("td_loss", td_loss, _TD_LOSSES)
        self.td_loss = td_loss

    def expected(self, raw: Float[Array, "*batch 1"]) -> Float[Array, "*batch"]:
        return raw[..., 0]

    def join(self, raw: Float[Array, "*batch F 1"]) -> Float[Array, "*batch 1"]:
        return jnp.mean(raw, axis=-2)

    def of_means(
        self, means: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch 1"], AbstractValue]:
        return means[..., None], self

    def samples(self, raw: Float[Array, "*batch 1"]) -> Float[Array, "*batch 1"]:
        return raw

    def loss(
        self, raw: Float[Array, "*batch 1"], targets: Float[Array, "*batch L"]
    ) -> tuple[Float[Array, "*batch"], Metrics]:
        return jnp.mean(_TD_LOSSES[self.td_loss](targets - raw), axis=-1), {}


class HLGauss(AbstractValue):
    """A histogram of the return, learnt as a classification of smoothed targets (HL-Gauss).

    Farebrother et al., "Stop Regressing", 2024 (arXiv 2403.03950). The raw numbers are logits of
    bins of equal width between `v_min` and `v_max`; the expected return is the mean of the bins'
    centres. A target becomes a Gaussian around it, truncated to the range; each bin gets the mass
    between its edges (§3.1). The loss is the cross entropy.

    With `symlog` the bins have equal width in the space of symlog(x) = sign(x) log(1 + |x|)
    (Hafner et al. 2023, arXiv 2301.04104, equation 9), for returns of many magnitudes. Edges,
    centres and the Gaussian live in that space; the expected return is the mean of symexp of the
    centres. So it stays linear in the probabilities, and targets bootstrap from a mean of returns,
    not of their logarithms.

    The mean of a projection equals its target. A single Gaussian would miss it where it is
    truncated, near the ends of the range, and under symlog, where its mean is too far from 0 by a
    factor of about exp(s²/2) for a standard deviation s; bootstrapping would compound that. So a
    target becomes a mixture of the Gaussian around it and a second one, shifted by a bin or a
    standard deviation (the larger), weighted to give the right mean. Elsewhere the second has
    practically no weight; as `sigma` goes to 0, the mixture becomes the two-hot encoding of Hafner
    et al. The mean still falls short for targets within about 0.7 bins of an end (with the default
    `sigma`): choose a range slightly wider than the returns.

    **Attributes:**

    - `num_bins`: `K`.
    - `v_min`, `v_max`: *traced*; the outer edges of the bins, as returns (also with `symlog`).
        Targets outside are clipped to them.
    - `sigma`: *traced*; the Gaussian's standard deviation, in bin widths.
    - `symlog`: whether bins have equal width under symlog.
    """

    num_samples: ClassVar[int] = 1

    v_min: Float[Array, ""]
    v_max: Float[Array, ""]
    sigma: Float[Array, ""]
    num_bins: int = eqx.field(static=True)
    symlog: bool = eqx.field(static=True)

    def __init__(
        self,
        num_bins: int = 51,
        v_min: Number = -10.0,
        v_max: Number = 10.0,
        sigma: Number = 0.75,
        symlog: bool = False,
    ):
        """The defaults are the paper's for Atari with clipped rewards."""
        check_whole(num_bins=num_bins, least=2)
        check_ranges({"value.v_min": v_min, "value.v_max": v_max, "value.sigma": sigma})
        is_known = not isinstance(v_min, Tracer) and not isinstance(v_max, Tracer)
        if is_known and not float(v_min) < float(v_max):
            raise UsageError(f"v_min={v_min} is not below v_max={v_max}: give bounds of returns")
        self.v_min, self.v_max, self.sigma = (
            jnp.asarray(x, jnp.float32) for x in (v_min, v_max, sigma)
        )
        self.num_bins, self.symlog = num_bins, symlog

    @property
    def num_outputs(self) -> int:
        return self.num_bins

    @property
    def edges(self) -> Float[Array, " edges"]:
        """Edges of the bins; with `symlog`, in its space."""
        low, high = self._squash(self.v_min), self._squash(self.v_max)
        return jnp.linspace(low, high, self.num_bins + 1)

    @property
    def centres(self) -> Float[Array, " K"]:
        """The return at the centre of each bin."""
        edges = self.edges
        centres = (edges[:-1] + edges[1:]) / 2
        return symexp(centres) if self.symlog else centres

    def expected(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
        return jnp.sum(jax.nn.softmax(raw) * self.centres, axis=-1)

    def join(self, raw: Float[Array, "*batch F K"]) -> Float[Array, "*batch K"]:
        """The logarithm of the mixture of the factors' distributions."""
        log_mass = jax.nn.log_softmax(raw)
        return jax.nn.logsumexp(log_mass, axis=-2) - jnp.log(raw.shape[-2])

    def of_means(
        self, means: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch 1"], AbstractValue]:
        return means[..., None], Scalar()

    def samples(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch 1"]:
        return self.expected(raw)[..., None]

    def loss(
        self, raw: Float[Array, "*batch K"], targets: Float[Array, "*batch L"]
    ) -> tuple[Float[Array, "*batch"], Metrics]:
        """See `AbstractValue`. No gradient flows into the targets.

        The metric `out_of_range` is the fraction of clipped targets.
        """
        mass = jnp.mean(self.project(jax.lax.stop_gradient(targets)), axis=-2)
        outside = jnp.mean((targets < self.v_min) | (targets > self.v_max), axis=-1)
        return -jnp.sum(mass * jax.nn.log_softmax(raw), axis=-1), {"out_of_range": outside}

    def project(self, targets: Float[Array, "*batch"]) -> Float[Array, "*batch K"]:
        """Projects targets to probabilities of the bins."""
        edges, centres = self.edges, self.centres
        targets = jnp.clip(targets, self.v_min, self.v_max)
        width = edges[1] - edges[0]
        deviation = self.sigma * width

        def gaussian(mean):
            below = jax.lax.erf((edges - mean[..., None]) / (deviation * math.sqrt(2)))
            mass = jnp.maximum(jnp.diff(below), 0)  # rounding can make erf non-monotone
            return mass / jnp.sum(mass, axis=-1, keepdims=True)

        location = self._squash(targets)
        first = gaussian(location)
        missing = targets - jnp.sum(first * centres, axis=-1)
        shift = jnp.sign(missing) * jnp.maximum(width, deviation)
        second = gaussian(jnp.clip(location + shift, edges[0], edges[-1]))
        gained = jnp.sum((second - first) * centres, axis=-1)
        weight = jnp.where(gained == 0, 0.0, missing / jnp.where(gained == 0, 1.0, gained))
        weight = jnp.clip(weight, 0.0, 1.0)[..., None]
        return (1 - weight) * first + weight * second

    def _squash(self, x: Float[Array, "*batch"]) -> Float[Array, "*batch"]:
        return symlog(x) if self.symlog else x


class Rescaled(AbstractValue):
    """The expected return, squashed, for unclipped rewards.

    The raw number is h(Q) with h(x) = sign(x) (√(|x| + 1) − 1) + εx and ε = 0.001, and the loss is
    half the squared error against h of the target (Pohlen et al. 2018, arXiv 1805.11593, §3.2;
    Kapturowski et al. 2019, R2D2, §2.3).
    """

    num_outputs: ClassVar[int] = 1
    num_samples: ClassVar[int] = 1

    def expected(self, raw: Float[Array, "*batch 1"]) -> Float[Array, "*batch"]:
        return self.expand(raw[..., 0])

    def join(self, raw: Float[Array, "*batch F 1"]) -> Float[Array, "*batch 1"]:
        return self.squash(jnp.mean(self.expand(raw), axis=-2))

    def of_means(
        self, means: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch 1"], AbstractValue]:
        return self.squash(means)[..., None], self

    def samples(self, raw: Float[Array, "*batch 1"]) -> Float[Array, "*batch 1"]:
        return self.expand(raw)

    def loss(
        self, raw: Float[Array, "*batch 1"], targets: Float[Array, "*batch L"]
    ) -> tuple[Float[Array, "*batch"], Metrics]:
        return jnp.mean(0.5 * (self.squash(targets) - raw) ** 2, axis=-1), {}

    def squash(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """h(x), as x times an even function, so that its gradient at 0 is right."""
        return x * (1 / (jnp.sqrt(jnp.abs(x) + 1) + 1) + _EPSILON)

    def expand(self, x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
        """The inverse of h in the same form, without cancellation of nearly equal numbers."""
        y = jnp.abs(x) + 1 + _EPSILON
        s = jnp.sqrt(1 + 4 * _EPSILON * y)
        root = 2 * y / (1 + s)  # its square is |h⁻¹(x)| + 1
        return x * (root + 1) * (2 - 4 * _EPSILON / (1 + 2 * _EPSILON + s)) / (1 + s)


class Quantile(AbstractValue):
    """Quantiles of the return, learnt with the quantile Huber loss.

    Dabney et al. 2018 (QR-DQN, arXiv 1710.10044). Their mean is the expected return. Targets
    bootstrap from each of them.

    **Attributes:** `num_quantiles`: `K`, at the fractions (2i + 1) / 2K.
    """

    num_quantiles: int = eqx.field(static=True)

    def __init__(self, num_quantiles: int = 200):
        check_whole(num_quantiles=num_quantiles)
        self.num_quantiles = num_quantiles

    @property
    def num_outputs(self) -> int:
        return self.num_quantiles

    @property
    def num_samples(self) -> int:
        return self.num_quantiles

    def expected(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch"]:
        return jnp.mean(raw, axis=-1)

    def join(self, raw: Float[Array, "*batch F K"]) -> Float[Array, "*batch K"]:
        """The mean over factors of each quantile."""
        return jnp.mean(raw, axis=-2)

    def of_means(
        self, means: Float[Array, "*batch"]
    ) -> tuple[Float[Array, "*batch 1"], AbstractValue]:
        return means[..., None], Scalar()

    def samples(self, raw: Float[Array, "*batch K"]) -> Float[Array, "*batch K"]:
        return raw

    def loss(
        self, raw: Float[Array, "*batch K"], targets: Float[Array, "*batch L"]
    ) -> tuple[Float[Array, "*batch"], Metrics]:
        return quantile_huber(raw, targets), {}


_EPSILON = 1e-3  # ε of `Rescaled`

VALUES = {
    "scalar": Scalar,
    "rescaled": Rescaled,
    "hl_gauss": HLGauss,
    "quantile": Quantile,
}


def make_value(given: str | Mapping[str, Any] | AbstractValue) -> AbstractValue:
    """Makes a value from a name, from a mapping `{"name": ..., **options}`, or returns an object.

    Options that are `None` keep their default.

    **Raises:** `UnknownNameError` for an unknown name or option, `UsageError` for invalid ranges
    and sizes.
    """
    return make_part("value", given, AbstractValue, VALUES)


def symlog(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sign(x) log(1 + |x|) (Hafner et al. 2023, equation 9)."""
    return jnp.sign(x) * jnp.log1p(jnp.abs(x))


def symexp(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """sign(x) (exp(|x|) - 1), the inverse of `symlog`."""
    return jnp.sign(x) * jnp.expm1(jnp.abs(x))


_TD_LOSSES = {
    "half_squared": lambda error: 0.5 * error**2,
    "squared": lambda error: error**2,
    "huber": optax.huber_loss,
}
