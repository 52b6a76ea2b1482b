"""scOT of Poseidon (Herde et al. 2024, arXiv:2405.19101) -> `physml.models.poseidon_scot`.

Reads the config.json that the authors publish beside their weights, or the constructor's arguments under
"hyperparameters" or "kwargs".
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from physml.convert.apply import Rule, fill, kernel, rule
from physml.convert.families import Family, Tensors, construct, inputs_of, pick, refuse, take, unit_grid
from physml.errors import ConversionError
from physml.fields import Channel, Signature, Spec
from physml.metrics.losses import MAE, MSE, SliceNormalized, replace_masked
from physml.models.poseidon_scot import ScOT, ScOTConfig

# Tables that follow from the geometry, and a counter: saved by some versions of the source, of no use here.
BUFFERS = ("relative_coords_table", "relative_position_index", "num_batches_tracked", "attn_mask")
ACTIVATIONS = {"swish": "silu"}
# What a published config also says: on saving, on text generation, on what the forward pass returns.
REMARKS = (
    "_attn_implementation_autoset", "_commit_hash", "_name_or_path", "add_cross_attention", "architectures",
    "attention_chunk_size", "bad_words_ids", "begin_suppress_tokens", "bos_token_id", "chunk_size_feed_forward",
    "cross_attention_hidden_size", "decoder_start_token_id", "diversity_penalty", "do_sample", "dtype",
    "early_stopping", "encoder_no_repeat_ngram_size", "encoder_stride", "eos_token_id",
    "exponential_decay_length_penalty", "finetuning_task", "forced_bos_token_id",
    "forced_eos_token_id", "hidden_size", "id2label", "is_decoder",
    "is_encoder_decoder", "label2id", "length_penalty", "max_length", "min_length", "model_type",
    "no_repeat_ngram_size", "num_attention_heads", "num_beam_groups", "num_beams", "num_hidden_layers", "num_layers",
    "num_return_sequences", "out_features", "out_indices", "output_attentions", "output_hidden_states", "output_scores",
    "pad_token_id", "prefix", "problem_type", "remove_invalid_values", "repetition_penalty", "return_dict",
    "return_dict_in_generate", "sep_token_id", "stage_names", "suppress_tokens", "task_specific_params", "temperature",
    "tf_legacy_loss", "tie_encoder_decoder", "tie_word_embeddings", "tokenizer_class", "top_k", "top_p", "torch_dtype",
    "torchscript", "transformers_version", "typical_p", "upstream", "upstream_class", "use_bfloat16",
)  # fmt: skip
INPUTS = (
    "labels",
    "pixel_mask",
    "pixel_values",
    "pixel_values_hires",
    "pixel_values_lowres",
    "time",
    "bool_masked_pos",
)


def config_of(config: Mapping[str, Any], *, mask_token: bool = False) -> tuple[ScOTConfig, Signature]:
    """The config and signature of the model that an upstream config describes."""
    kwargs = dict(config.get("hyperparameters") or config.get("kwargs") or config)
    for name in REMARKS:
        kwargs.pop(name, None)
    size, patch = _square(kwargs, "image_size", 224), _square(kwargs, "patch_size", 4)
    depths = tuple(take(kwargs, "depths", (2, 2, 6, 2)))
    conditioned = bool(take(kwargs, "use_conditioning", False))
    activation = take(kwargs, "hidden_act", "gelu")
    take(kwargs, "p", 1), take(kwargs, "channel_slice_list_normalized_loss", None)  # of the loss, see `loss_of`
    inputs, outputs = take(kwargs, "num_channels", 3), take(kwargs, "num_out_channels", 1)
    built = ScOTConfig(
        width=take(kwargs, "embed_dim", 96),
        depths=depths,
        heads=tuple(take(kwargs, "num_heads", (3, 6, 12, 24))),
        skip_blocks=tuple(int(blocks) for blocks in take(kwargs, "skip_connections", (True, True, True))),
        patch=patch,
        window=_square(kwargs, "window_size", 7),
        mlp_ratio=float(take(kwargs, "mlp_ratio", 4.0)),
        skip=take(kwargs, "residual_model", "convnext"),
        attention_bias=bool(take(kwargs, "qkv_bias", True)),
        activation=ACTIVATIONS.get(activation, activation),
        # The source ignores the wish for a residual where there is no lead time.
        residual=bool(take(kwargs, "learn_residual", False)) and conditioned,
        position_embedding=bool(take(kwargs, "use_absolute_embeddings", False)),
        mask_token=mask_token or bool(take(kwargs, "use_mask_token", False)),
        boundary="zero",
        image_size=(size, size),
        dropout=float(take(kwargs, "hidden_dropout_prob", 0.0)),
        attention_dropout=float(take(kwargs, "attention_probs_dropout_prob", 0.0)),
        drop_path=float(take(kwargs, "drop_path_rate", 0.1)),
        deviation=float(take(kwargs, "initializer_range", 0.02)),
        scale_start=0.0 if conditioned else 1.0,
        epsilon=float(take(kwargs, "layer_norm_eps", 1e-5)),
    )
    kwargs.pop("use_mask_token", None)
    windows = take(kwargs, "pretrained_window_sizes", ())
    if any(np.ravel(windows)):
        raise ConversionError(f"pretrained_window_sizes={windows} is not supported: the source never sets them.")
    refuse(kwargs, {"path_norm": (True, False), "pruned_heads": ({},), "output_all_steps": (False, True)})
    return built, Signature(unit_grid((size, size)), inputs, int(conditioned), outputs)


def _square(kwargs: dict[str, Any], name: str, default: int) -> int:
    value = take(kwargs, name, default)
    sizes = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sizes) != 1:
        raise ConversionError(f"{name}={value} is not supported: the source works on squares only.")
    return int(sizes.pop())


def build(config: Mapping[str, Any], tensors: Tensors) -> ScOT:
    """The model with upstream weights. See `Family.build`."""
    masks = "embeddings.mask_token" in tensors
    model = construct(lambda config: config_of(config, mask_token=masks), config)
    fill(model, tensors, rules(model), ignored=[name for name in tensors if name.rsplit(".", 1)[-1] in BUFFERS])
    return model


def rules(model: ScOT) -> list[Rule]:
    """Which upstream tensors make which parameter; those of equal blocks are stacked."""
    scalars, stages = model.signature.scalars, len(model.config.depths)
    table = [
        rule("embedding.patches.weight", "embeddings.patch_embeddings.projection.weight", change=kernel),
        rule("embedding.patches.bias", "embeddings.patch_embeddings.projection.bias"),
        *_norm("embedding.norm", ["embeddings.norm"], scalars, alone=True),
        rule("recovery.weight", "patch_recovery.projection.weight", change=lambda w: np.transpose(w, (0, 2, 3, 1))),
        rule("recovery.bias", "patch_recovery.projection.bias"),
        rule("recovery.mixing.weight", "patch_recovery.mixup.weight", change=kernel),
    ]
    if model.config.mask_token:
        table.append(rule("embedding.mask_token", "embeddings.mask_token", change=np.ravel))
    if model.config.position_embedding:
        shape = model.embedding.positions.shape
        table.append(
            rule("embedding.positions", "embeddings.position_embeddings", change=lambda p: np.reshape(p, shape))
        )
    for i in range(stages):
        for side in ("encoder", "decoder"):
            depth = len(getattr(model, side)[i].rates)
            theirs = [f"{side}.layers.{i}.blocks.{j}" for j in range(depth)]
            table += _blocks(f"{side}.{i}.blocks.blocks", theirs, scalars, model.config.attention_bias)
        if i < stages - 1:
            ours, theirs = f"merging.{i}", f"encoder.layers.{i}.downsample"
            table.append(rule(f"{ours}.reduction.weight", f"{theirs}.reduction.weight", change=np.transpose))
            table += _norm(f"{ours}.norm", [f"{theirs}.norm"], scalars, alone=True)
            ours, theirs = f"unmerging.{i}", f"decoder.layers.{i}.upsample"
            table.append(rule(f"{ours}.expansion.weight", f"{theirs}.upsample.weight", change=np.transpose))
            table.append(rule(f"{ours}.mixing.weight", f"{theirs}.mixup.weight", change=np.transpose))
            table += _norm(f"{ours}.norm", [f"{theirs}.norm"], scalars, alone=True)
        for j in range(model.config.skip_blocks[i]):
            skip = _convnext if model.config.skip == "convnext" else _resnet
            table += skip(f"skips.{i}.{j}", f"residual_blocks.{i}.{j}", scalars)
    return table


def _blocks(ours: str, theirs: list[str], scalars: int, bias: bool) -> list[Rule]:
    attention = [f"{block}.attention.self" for block in theirs]

    def stacked(target: str, suffix: str, change: Callable = np.asarray, prefixes: list[str] = theirs) -> Rule:
        return rule(f"{ours}.{target}", *(f"{name}.{suffix}" for name in prefixes), change=_stack(change))

    mlp = "continuous_position_bias_mlp"
    table = [
        rule(
            f"{ours}.attention.qkv.weight",
            *(f"{name}.{part}.weight" for name in attention for part in ("query", "key", "value")),
            change=_stack(lambda *parts: np.concatenate(parts).T, 3),
        ),
        stacked("attention.logit_scale", "logit_scale", np.ravel, attention),
        stacked("attention.position_bias.mlp.first.weight", f"{mlp}.0.weight", np.transpose, attention),
        stacked("attention.position_bias.mlp.first.bias", f"{mlp}.0.bias", prefixes=attention),
        stacked("attention.position_bias.mlp.second.weight", f"{mlp}.2.weight", np.transpose, attention),
        stacked("attention.output.weight", "attention.output.dense.weight", np.transpose),
        stacked("attention.output.bias", "attention.output.dense.bias"),
        stacked("mlp.first.weight", "intermediate.dense.weight", np.transpose),
        stacked("mlp.first.bias", "intermediate.dense.bias"),
        stacked("mlp.second.weight", "output.dense.weight", np.transpose),
        stacked("mlp.second.bias", "output.dense.bias"),
    ]
    if bias:
        table += [
            stacked("attention.query_bias", "query.bias", prefixes=attention),
            stacked("attention.value_bias", "value.bias", prefixes=attention),
        ]
    table += _norm(f"{ours}.attention_norm", [f"{block}.layernorm_before" for block in theirs], scalars)
    return table + _norm(f"{ours}.mlp_norm", [f"{block}.layernorm_after" for block in theirs], scalars)


def _norm(ours: str, theirs: list[str], scalars: int, *, alone: bool = False) -> list[Rule]:
    """One norm, or one of each of several blocks."""
    names = [("scale", "weight", np.asarray), ("shift", "bias", np.asarray)]
    if scalars:
        names = [("scale", "weight.bias", np.asarray), ("shift", "bias.bias", np.asarray)]
        names += [("scale_by", "weight.weight", np.transpose), ("shift_by", "bias.weight", np.transpose)]
    return [
        rule(f"{ours}.{target}", *(f"{norm}.{source}" for norm in theirs), change=change if alone else _stack(change))
        for target, source, change in names
    ]


def _convnext(ours: str, theirs: str, scalars: int) -> list[Rule]:
    return [
        rule(f"{ours}.convolution.weight", f"{theirs}.dwconv.weight", change=kernel),
        rule(f"{ours}.convolution.bias", f"{theirs}.dwconv.bias"),
        *_norm(f"{ours}.norm", [f"{theirs}.norm"], scalars, alone=True),
        rule(f"{ours}.mlp.first.weight", f"{theirs}.pwconv1.weight", change=np.transpose),
        rule(f"{ours}.mlp.first.bias", f"{theirs}.pwconv1.bias"),
        rule(f"{ours}.mlp.second.weight", f"{theirs}.pwconv2.weight", change=np.transpose),
        rule(f"{ours}.mlp.second.bias", f"{theirs}.pwconv2.bias"),
        rule(f"{ours}.layer_scale", f"{theirs}.weight"),
    ]


def _resnet(ours: str, theirs: str, scalars: int) -> list[Rule]:
    table = []
    for layer, number in (("first", 1), ("second", 2)):
        norm = ("weight", "weight"), ("bias", "bias"), ("mean", "running_mean"), ("variance", "running_var")
        table.append(rule(f"{ours}.{layer}.weight", f"{theirs}.conv{number}.weight", change=kernel))
        table.append(rule(f"{ours}.{layer}.bias", f"{theirs}.conv{number}.bias"))
        table += [rule(f"{ours}.{layer}_norm.{target}", f"{theirs}.bn{number}.{source}") for target, source in norm]
    return table


def _stack(change: Callable, parts: int = 1) -> Callable[..., np.ndarray]:
    """Of `parts` tensors of each block the changed one, blocks along a new first axis."""

    def all_blocks(*tensors: np.ndarray) -> np.ndarray:
        return np.stack([change(*tensors[i : i + parts]) for i in range(0, len(tensors), parts)])

    return all_blocks


def loss_of(config: Mapping[str, Any]) -> MAE | MSE | SliceNormalized:
    """The loss that an upstream config asks for. Raises ConversionError for another power than 1 and 2."""
    kwargs = config.get("hyperparameters") or config.get("kwargs") or config
    power, slices = kwargs.get("p", 1), kwargs.get("channel_slice_list_normalized_loss")
    if power not in (1, 2):
        raise ConversionError(f"p={power} is not supported: the loss has p = 1 or p = 2.")
    if slices is not None:
        return SliceNormalized(p=power, slices=tuple(slices))
    return MAE() if power == 1 else MSE()


def replay(model: ScOT, config: Mapping[str, Any], io: Tensors) -> dict[str, np.ndarray]:
    """Recomputes what was recorded. See `Family.replay`.

    Inputs are those of the source's forward pass, channels first: pixel_values, time, and where they are there
    pixel_mask, labels and bool_masked_pos.
    """
    output, seen = _run(model, io, "pixel_values")
    available = {name: lambda value=value: value for name, value in _activations(seen).items()}
    available["output"] = lambda: jnp.moveaxis(output, -1, 1)
    for suffix in ("lowres", "hires"):
        if f"pixel_values_{suffix}" in io:
            available[f"output_{suffix}"] = lambda s=suffix: jnp.moveaxis(
                _run(model, io, f"pixel_values_{s}")[0], -1, 1
            )
    if "labels" in io:
        labels, loss = jnp.moveaxis(inputs_of(io, "labels")[0], 1, -1), loss_of(config)
        names = tuple(Channel(str(i)) for i in range(labels.shape[-1]))
        spec = Spec(unit_grid(labels.shape[1:-1]), names)

        def score(prediction):
            return loss(prediction[:, None], labels[:, None], spec)[None]

        available["loss"] = lambda: score(output)
        if "pixel_mask" in io:
            hidden = np.asarray(io["pixel_mask"], bool)
            hidden = hidden[:, None, None] if hidden.ndim == 2 else np.moveaxis(hidden, 1, -1)
            masked = replace_masked(output, labels, ~hidden)
            available["output_masked"] = lambda: jnp.moveaxis(masked, -1, 1)
            available["loss_masked"] = lambda: score(masked)
    return pick(available, [name for name in io if name not in INPUTS])


def _run(model: ScOT, io: Tensors, name: str):
    """The output, channels last, and the hidden fields as tokens `(batch, height * width, channel)`."""
    (pixels,) = inputs_of(io, name)
    conditioned = model.signature.scalars
    time = inputs_of(io, "time")[0][:, None] if conditioned else np.zeros((len(pixels), 0), np.float32)
    masked = io.get("bool_masked_pos")
    if masked is not None:
        masked = np.reshape(masked, (len(pixels), *(points // model.config.patch for points in model.grid)))

    @nnx.jit
    def run(model, fields, time):
        seen: dict[str, jax.Array] = {}
        output = model(fields, time, masked=masked, visit=seen.__setitem__)
        return output, {name: x.reshape(len(x), -1, x.shape[-1]) for name, x in seen.items()}

    return run(model, np.moveaxis(pixels, 1, -1), time)


def _activations(seen: Mapping[str, jax.Array]) -> dict[str, Any]:
    """What `ScOT` lets see, under the recorded names."""
    names = {"embedding": "act.embedding"}
    for name in seen:
        part, *numbers = name.split(".")
        if len(numbers) == 3:
            names[name] = f"act.{part}{numbers[0]}_block{numbers[2]}"
        elif numbers:
            pattern = {
                "encoder": "act.encoder{}_before_downsampling", "merging": "act.encoder{}_after_downsampling",
                "skip": "act.skip{}", "decoder": "act.decoder{}_out",
            }[part]  # fmt: skip
            names[name] = pattern.format(numbers[0])
    return {names[name]: value for name, value in seen.items()}


POSEIDON_SCOT_FAMILY = Family(build, replay, inputs=INPUTS)
