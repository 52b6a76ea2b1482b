"""`physml finetune`: train an experiment from the weights of another run or of a published model."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from physml.verbs.train import TrainingVerb


@dataclass(frozen=True, kw_only=True)
class Finetune(TrainingVerb):
    """Train from the weights of a run, a saved model or a published one, and say which of them found their place.

    Example: physml finetune runs/demo experiments/other.py --name tuned --set lora.rank=8
    Example: physml finetune poseidon-t experiments/flow.py --weights Poseidon-T
    """

    source: tyro.conf.Positional[str]
    """A run, a folder made by `physml.save`, or with --weights the name of a published model."""
    experiment: tyro.conf.Positional[str]
    """A .py or .yaml file; without a `model`, model and stepper are those of the source."""
    weights: str = ""
    """For a published model: the downloaded folder."""
    strict: bool = False
    """Stop unless every number of the source and of the model is matched."""
    normalizer: Literal["saved", "data"] = "saved"
    """saved: the source's where the channels are the same; data: fitted to the new data."""

    def run(self) -> dict[str, Any]:
        from physml.experiment import load_experiment
        from physml.parallel.mesh import start_distributed
        from physml.saving import StartFrom

        start_distributed()
        start = StartFrom(self.source, self.weights, self.strict, self.normalizer)
        # Before the other overrides: some of them, such as lora, need it.
        experiment = dataclasses.replace(load_experiment(self.experiment), start_from=start)
        return self.train(load_experiment(experiment, self.set))
