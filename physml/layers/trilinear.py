"""Primitives of jax for sums that are linear in each of three arrays, closed under differentiation.

The derivative of `sum(x y z)`, over any indices, by one of the three is a contraction of the other two, and the
derivatives of contractions are contractions again. So one primitive, told which of the three is wanted, has all
derivatives of every order, forward and backward, and each contraction is written in the way that is fast. (A gradient
written by `jax.custom_vjp` has no tangents, and second derivatives that jax derives.)
"""

import functools
from collections.abc import Callable, Hashable

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

# What is wanted, the other two arrays in their order, options, and what `keep` kept.
Contract = Callable[[str, jax.Array, jax.Array, Hashable, tuple[int, ...]], jax.Array]


class Trilinear:
    """A sum over three arrays: `sum(wanted, a, b, how)` is the wanted one's contraction of the others in their order.

    `jax.vmap` makes one batch of several contractions, except where CPUs have their own.
    """

    def __init__(
        self,
        name: str,
        operands: tuple[str, str, str],
        contract: Contract,
        *,
        on_cpu: Contract | None = None,
        keep: Callable[[str, tuple[int, ...]], tuple[int, ...]] = lambda operand, shape: (),
        shared: str | None = None,
    ):
        """
        Args:
            operands: names of the three arrays.
            contract: computes what is wanted.
            on_cpu: does so on CPUs, of what `jax.vmap` maps one after the other; None: `contract`.
            keep: of the name and shape of an array, what `contract` needs to know to give it.
            shared: the operand of which one serves a longer first axis of the others, as a kernel does a batch.
        """
        self.operands, self.contract, self.on_cpu, self.keep, self.shared = operands, contract, on_cpu, keep, shared
        self.primitive = Primitive(name)
        self.compiled = jax.jit(self.primitive.bind, static_argnames=("wanted", "how", "kept", "members"))
        self.primitive.def_impl(self._outside_of_jit)
        self.primitive.def_abstract_eval(self._abstract)
        ad.defbilinear(self.primitive, functools.partial(self._transposed, 0), functools.partial(self._transposed, 1))
        batching.primitive_batchers[self.primitive] = self._mapped
        mlir.register_lowering(self.primitive, mlir.lower_fun(self._at_once, multiple_results=False))
        if on_cpu is not None:
            mlir.register_lowering(
                self.primitive, mlir.lower_fun(self._one_by_one, multiple_results=False), platform="cpu"
            )

    def __call__(self, wanted: str, a, b, how: Hashable = None) -> jax.Array:
        return self._bind(wanted, a, b, how, (), 0)

    def _bind(self, wanted: str, a, b, how, kept: tuple[int, ...], members: int):
        """All arrays have `members` axes before their own."""
        if jax.sharding.get_abstract_mesh().manual_axes:  # in a shard_map: both must vary along the same of its axes
            a, b = a * jax.lax.full_like(b, 1, shape=()), b * jax.lax.full_like(a, 1, shape=())
        return self.primitive.bind(a, b, wanted=wanted, how=how, kept=kept, members=members)

    def _outside_of_jit(self, a, b, **options):
        with jax.disable_jit(False):  # as jax's own operations, which are compiled whoever debugs
            return self.compiled(a, b, **options)

    def _at_once(self, a, b, *, wanted, how, kept, members):
        def function(a, b):
            return self.contract(wanted, a, b, how, kept)

        for _ in range(members):
            function = jax.vmap(function)
        return function(a, b)

    def _one_by_one(self, a, b, *, wanted, how, kept, members):
        if not members:
            return self.on_cpu(wanted, a, b, how, kept)
        rest = {"wanted": wanted, "how": how, "kept": kept, "members": members - 1}
        return jnp.stack([self._one_by_one(a[i], b[i], **rest) for i in range(a.shape[0])])

    def _abstract(self, a, b, **options):
        return jax.make_jaxpr(functools.partial(self._at_once, **options))(a, b).out_avals[0]

    def _transposed(self, at: int, cotangent, a, b, *, wanted, how, kept, members):
        """By operand `at`, from the cotangent of the wanted one."""
        names = [name for name in self.operands if name != wanted]
        shape = (a, b)[at].aval.shape[members:]
        given = {wanted: cotangent, names[1 - at]: (a, b)[1 - at]}
        pair = (given[name] for name in self.operands if name in given)
        return self._bind(names[at], *pair, how, self.keep(names[at], shape), members)

    def _mapped(self, arrays, axes, *, wanted, how, kept, members):
        size = next(array.shape[axis] for array, axis in zip(arrays, axes, strict=True) if axis is not None)
        names = [name for name in self.operands if name != wanted]
        if self.shared in names and axes[names.index(self.shared)] is None:
            at = 1 - names.index(self.shared)
            longer = jnp.moveaxis(arrays[at], axes[at], members)
            lead, (count, *rest) = longer.shape[: members + 1], longer.shape[members + 1 :]
            pair = list(arrays)
            pair[at] = longer.reshape(*lead[:-1], size * count, *rest)
            found = self._bind(wanted, *pair, how, kept, members)
            return found.reshape(*lead, count, *found.shape[members + 1 :]), members
        pair = (
            jnp.broadcast_to(array, (size, *array.shape)) if axis is None else jnp.moveaxis(array, axis, 0)
            for array, axis in zip(arrays, axes, strict=True)
        )
        return self._bind(wanted, *pair, how, kept, members + 1), 0
