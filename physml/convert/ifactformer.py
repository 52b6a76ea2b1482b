"""IFactFormer-m and -o of their authors (repository huiyu-2002/IFactFormer-m) -> `physml.models.ifactformer`."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import Rule, fill, matrix, rule, weight_and_bias
from physml.convert.families import Family, Tensors, arguments, construct, inputs_of, outputs_of, pick, refuse, take
from physml.errors import ConversionError
from physml.fields import Axis, Grid, Signature
from physml.models.ifactformer import IFactFormer, IFactFormerConfig

FORMS = {"IFactFormer_m": "parallel", "IFactFormer_o": "chained"}
CHANNEL = ((32, 33, 16), (4 * np.pi, 2.0, 4 * np.pi / 3))  # points and lengths of the authors' channel flow


def config_of(config: Mapping[str, Any]) -> tuple[IFactFormerConfig, Signature]:
    """The config and signature of the model that a recorded upstream config describes.

    "grid" and "length" give points and lengths of the axes, whose coordinates run from 0 to the length with both ends;
    without them the authors' channel is taken, as weights do not depend on it.
    """
    kwargs = arguments(config)
    points, lengths = (config.get(name, value) for name, value in zip(("grid", "length"), CHANNEL, strict=True))
    if "kwargs" not in config:
        for name in ("grid", "length", "arch", "upstream"):
            kwargs.pop(name, None)
    form = take(kwargs, "model", "IFactFormer_m")
    if form not in FORMS:
        raise ConversionError(f"model={form!r} is not supported: only {sorted(FORMS)} are.")
    history = take(kwargs, "in_time_window", 1)
    inputs, outputs = take(kwargs, "in_dim"), take(kwargs, "out_dim")
    built = IFactFormerConfig(
        width=take(kwargs, "dim"),
        heads=take(kwargs, "heads"),
        head_width=take(kwargs, "dim_head"),
        depth=take(kwargs, "depth"),
        iterations=take(kwargs, "n_layer"),
        form=FORMS[form],
        kernel_multiplier=take(kwargs, "kernel_multiplier", 3),
        kernel_scale=float(take(kwargs, "scaling_factor", 1.0)),
        rotary=take(kwargs, "use_rope", True),
        history=history,
    )
    refuse(kwargs, {})
    if built.width // 2 % inputs:
        raise ConversionError(f"dim={built.width}: half of it must be a multiple of in_dim={inputs}.")
    positions = [np.linspace(0, length, n) for n, length in zip(points, lengths, strict=True)]
    return built, Signature(grid_of(positions), history * inputs, 0, outputs)


def grid_of(positions: Sequence[np.ndarray]) -> Grid:
    """The grid of these coordinate vectors."""
    return Grid(tuple(Axis(name, tuple(map(float, np.ravel(x)))) for name, x in zip("xyz", positions)))


def build(config: Mapping[str, Any], tensors: Tensors) -> IFactFormer:
    """The model with upstream weights. See `Family.build`."""
    model = construct(config_of, config)
    fill(model, tensors, rules(model))
    return model


def rules(model: IFactFormer) -> list[Rule]:
    """Which upstream tensors make which parameter."""
    table = [
        rule("entry_weight", "to_in.0.weight", change=np.ravel),
        rule("entry_bias", "to_in.0.bias"),
        rule("entry.weight", "to_in.2.weight", change=_time_major),
        rule("narrow.weight", "simple_to_out.1.weight", change=matrix),
        rule("readout.weight", "simple_to_out.3.weight", change=matrix),
        rule("readout.bias", "simple_to_out.3.bias"),
    ]
    for i, layer in enumerate(model.layers):
        table += _layer(f"layers.{i}", f"encoder.layers.{i}", layer.attention)
    return table


def _layer(ours: str, theirs: str, attention) -> list[Rule]:
    block, here = f"{theirs}.1", f"{ours}.attention"
    parts = attention.mix.shape[0]

    def by_axis(weight: np.ndarray) -> np.ndarray:
        """(out, heads x (axis, channel)) -> (axis, out, heads x channel)."""
        split = weight.reshape(len(weight), attention.heads, parts, -1)
        return np.moveaxis(split, 2, 0).reshape(parts, len(weight), -1)

    table = [
        rule(f"{ours}.positions.waves", f"{theirs}.0.0._B"),
        *weight_and_bias(f"{ours}.positions.linear", f"{theirs}.0.1", matrix),
        *_norm(f"{here}.norm", f"{block}.in_norm"),
        rule(f"{here}.value", f"{block}.to_v.weight"),
        rule(f"{here}.entry.weight", f"{block}.to_in.weight", change=np.transpose),
        rule(f"{here}.mix", f"{block}.to_out.2.weight", change=by_axis),
        rule(f"{here}.last.weight", f"{block}.to_out.4.weight", change=np.transpose),
    ]
    for i, axis in enumerate("xyz"):
        pool = f"{block}.to_{axis}.{min(i, 1)}"  # a module that moves axes comes first for y and z
        low, kernel = f"{block}.low_rank_kernel_{axis}", f"{here}.kernels.{i}"
        table += [
            rule(f"{kernel}.pool.weight", f"{pool}.to_in.weight", change=np.transpose),
            *_norm(f"{kernel}.norm", f"{pool}.out_ffn.norm"),
            *weight_and_bias(f"{kernel}.gated", f"{pool}.out_ffn.fn.net.0", matrix),
            *weight_and_bias(f"{kernel}.mixed", f"{pool}.out_ffn.fn.net.3", matrix),
            rule(f"{kernel}.query.weight", f"{low}.to_q.weight", change=np.transpose),
            rule(f"{kernel}.key.weight", f"{low}.to_k.weight", change=np.transpose),
        ]
        if attention.kernels[i].inverse is not None:
            table.append(rule(f"{kernel}.inverse", f"{low}.pos_emb.inv_freq"))
    return table


def _norm(ours: str, theirs: str) -> list[Rule]:
    return [rule(f"{ours}.scale", f"{theirs}.weight"), rule(f"{ours}.shift", f"{theirs}.bias")]


def _time_major(weight: np.ndarray) -> np.ndarray:
    """(out, in, time, 1) -> (time x in, out)."""
    return np.moveaxis(weight[..., 0], 0, -1).swapaxes(0, 1).reshape(-1, len(weight))


def replay(model: IFactFormer, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`."""
    x, *positions = inputs_of(io, "in.u", "in.pos_x", "in.pos_y", "in.pos_z")
    model = on_grid(model, grid_of([np.asarray(io[f"in.pos_{axis}"], np.float64) for axis in "xyz"]))
    fields = jnp.moveaxis(x, 1, -2).reshape(*x.shape[:1], *x.shape[2:-1], -1)
    axes = model.signature.grid.axes
    u = model.lift(fields, jnp.zeros((len(x), 0)))
    values = {"mid.to_in": jnp.moveaxis(u.reshape(len(u), -1, u.shape[-1]), -1, 1)[:, :, None]}
    for i, layer in enumerate(model.layers):
        values[f"mid.pos_enc{i}"] = layer.positions(axes, model.whole).reshape(1, -1, u.shape[-1])
        u, tables = layer.place(u, axes, model.whole), layer.attention.tables(axes, model.whole)
        for call in range(layer.iterations):
            for axis, kernel in zip("xyz", layer.attention.of_axes(layer.attention.norm(u), tables)):
                values[f"mid.block{i}.kernel_{axis}.call{call}"] = kernel
            values[f"mid.block{i}.call{call}"] = layer.attention(u, tables)
            u = u + values[f"mid.block{i}.call{call}"] / layer.iterations
    values |= {"mid.out_head_in": u, "out.y": model(fields, jnp.zeros((len(x), 0)))}
    return pick({name: lambda value=value: value for name, value in values.items()}, outputs_of(config, io))


def on_grid(model: IFactFormer, grid: Grid) -> IFactFormer:
    """The same weights on another grid."""
    old = model.signature
    other = nnx.clone(model)
    other.signature = Signature(grid, old.inputs, old.scalars, old.outputs)
    return other


IFACTFORMER_FAMILY = Family(build, replay)
