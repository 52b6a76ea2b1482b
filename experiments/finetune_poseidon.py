"""Does a checkpoint in Poseidon's published layout load, take other channels and learn a new problem?

    python experiments/finetune_poseidon.py                      a few minutes on two cores; ends with the errors
    python experiments/finetune_poseidon.py --weights FOLDER     starts from a checkpoint of your own, e.g. Poseidon-T

Writes config.json and model.safetensors as the authors do, with random weights for four channels (nothing is
downloaded), loads them with `physml.load`, replaces embedding and recovery for the single channel of generated
Kolmogorov flow, and fine-tunes with the authors' three groups: embedding and recovery, norms that carry the lead time,
and the rest. Random weights hold no knowledge, so all rates are ten times theirs and the error falls from about that of
a constant forecast; with released weights leave `--rate` at 5e-5. Expect the error after to be below half of before.
"""

import argparse
import json
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx
from safetensors.numpy import save_file

import physml
from physml import SyntheticConfig, TrainingConfig
from physml.evaluate import evaluate_stepper
from physml.metrics.losses import SliceNormalized
from physml.models.poseidon_scot import with_channels
from physml.normalize import Normalizer
from physml.objectives import OneStep
from physml.parallel.mesh import Layout
from physml.steppers.plain import DirectConfig
from physml.training import fit
from physml.training.finetuning import POSEIDON_FINETUNING

PUBLISHED = {
    "architectures": ["ScOT"], "model_type": "swinv2", "torch_dtype": "float32", "image_size": 32, "patch_size": 2,
    "num_channels": 4, "num_out_channels": 4, "embed_dim": 24, "depths": [2, 2], "num_heads": [3, 6],
    "skip_connections": [1, 0], "window_size": 8, "mlp_ratio": 4.0, "qkv_bias": True, "drop_path_rate": 0.0,
    "use_conditioning": True, "p": 1, "channel_slice_list_normalized_loss": [0, 1, 3, 4],
}  # fmt: skip


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the authors' state dict."""
    width, patch = config["embed_dim"], config["patch_size"]
    inputs, outputs, stages = config["num_channels"], config["num_out_channels"], len(config["depths"])
    found = {
        "embeddings.patch_embeddings.projection.weight": (width, inputs, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (width,),
        "patch_recovery.projection.weight": (width, outputs, patch, patch),
        "patch_recovery.projection.bias": (outputs,),
        "patch_recovery.mixup.weight": (outputs, outputs, 5, 5),
    }

    def linear(name: str, outputs: int, inputs: int, bias: bool = True):
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    def norm(name: str, channels: int):
        linear(f"{name}.weight", channels, 1)
        linear(f"{name}.bias", channels, 1)

    norm("embeddings.norm", width)
    for stage, depth in enumerate(config["depths"]):
        channels, heads = width * 2**stage, config["num_heads"][stage]
        for side, place in (("encoder", stage), ("decoder", stages - 1 - stage)):
            for block in range(depth):
                name = f"{side}.layers.{place}.blocks.{block}"
                attention = f"{name}.attention.self"
                for part in ("query", "key", "value"):
                    linear(f"{attention}.{part}", channels, channels, bias=part != "key")
                found[f"{attention}.logit_scale"] = (heads, 1, 1)
                linear(f"{attention}.continuous_position_bias_mlp.0", 512, 2)
                linear(f"{attention}.continuous_position_bias_mlp.2", heads, 512, bias=False)
                linear(f"{name}.attention.output.dense", channels, channels)
                linear(f"{name}.intermediate.dense", 4 * channels, channels)
                linear(f"{name}.output.dense", channels, 4 * channels)
                norm(f"{name}.layernorm_before", channels)
                norm(f"{name}.layernorm_after", channels)
        if stage < stages - 1:
            name = f"encoder.layers.{stage}.downsample"
            linear(f"{name}.reduction", 2 * channels, 4 * channels, bias=False)
            norm(f"{name}.norm", 2 * channels)
            name = f"decoder.layers.{stages - 2 - stage}.upsample"
            linear(f"{name}.upsample", 4 * channels, 2 * channels, bias=False)
            linear(f"{name}.mixup", channels, channels, bias=False)
            norm(f"{name}.norm", channels)
        for block in range(config["skip_connections"][stage]):
            name = f"residual_blocks.{stage}.{block}"
            found |= {f"{name}.dwconv.weight": (channels, 1, 7, 7), f"{name}.dwconv.bias": (channels,)}
            found[f"{name}.weight"] = (channels,)
            linear(f"{name}.pwconv1", 4 * channels, channels)
            linear(f"{name}.pwconv2", channels, 4 * channels)
            norm(f"{name}.norm", channels)
    return found


def publish(folder: Path, config: dict = PUBLISHED, seed: int = 0) -> Path:
    """Writes a random checkpoint as the authors publish theirs: scales of norms near 1, other numbers near 0."""
    random = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(config).items():
        fan_in = int(np.prod(shape[1:])) if len(shape) > 1 else 1
        value = random.standard_normal(shape) * (0.02 if len(shape) == 1 else min(0.5 / np.sqrt(fan_in), 0.1))
        is_scale = name.endswith("weight.bias") and "norm" in name
        tensors[name] = (value + (is_scale or "logit_scale" in name)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def finetune(weights: Path, work: Path, *, steps: int, rate: float, name: str = "poseidon_scot") -> tuple[float, float]:
    """Error of one step (relative to the size of the field) before and after."""
    data = SyntheticConfig(
        "kolmogorov", points=32, trajectories={"train": 8, "valid": 1, "test": 2}, steps=40, time_step=0.2,
        options={"solver_points": 64, "substeps": 8, "precision": "float32", "warmup": 10.0},
    ).open()  # fmt: skip
    model, direct, spec = physml.load(name, weights=weights), DirectConfig(lead=True), data["train"].spec
    print(f"Loaded {type(model).__name__} for {model.signature.inputs} channels from {weights}.")
    model = with_channels(model, direct.signature(spec), rngs=nnx.Rngs(0))
    stepper = direct.build(spec, model, Normalizer.fit(data["train"].windows()))
    optimizer = POSEIDON_FINETUNING.scaled(rate / POSEIDON_FINETUNING.learning_rate)
    training = TrainingConfig(steps=steps, batch=8, optimizer=optimizer, log_every=max(steps // 10, 1))
    before = error(stepper, data["test"])
    trained = fit(stepper, data, OneStep(SliceNormalized()), training, Layout(), work, resume="never").stepper
    return before, error(trained, data["test"])


def error(stepper, dataset) -> float:
    scores = evaluate_stepper(stepper, dataset, 1, metrics=["nrmse"])
    return float(scores["score"].sel(metric="nrmse").mean())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, help="a published checkpoint; a small random one is made if not given")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rate", type=float, default=5e-4, help="of the trunk; embedding and norms learn ten times it")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        source = given.weights or publish(Path(scratch) / "checkpoint")
        first, last = finetune(source, Path(scratch) / "run", steps=given.steps, rate=given.rate)
    print(f"One-step error before {first:.3f}, after {last:.3f} of the field's size ({given.steps} updates).")
