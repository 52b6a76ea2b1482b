"""Optimizers with which authors fine-tune their released models."""

from physml.training.optimizers import OptimizerConfig, ParameterGroup

# Poseidon: embedding and recovery, with the embedding's norm; the other norms, which carry the lead time; and what the
# authors leave without weight decay, the perceptron of the position bias among it. The rest has the optimizer's own
# rate. For networks that are conditioned on the lead time, as the released ones are: without, norms have the ordinary
# rate (`learning_rate=None` in the second group). Patterns fit the paths of `physml.models.poseidon_scot`. Herde et al.
# 2024, arXiv:2405.19101, appendix.
POSEIDON_GROUPS = (
    ParameterGroup(r"(^|\.)(embedding|recovery)\.", learning_rate=5e-4),
    ParameterGroup(r"\.(scale|shift)(_by)?$", learning_rate=5e-4, weight_decay=0.0),
    ParameterGroup(r"bias", weight_decay=0.0),
)
POSEIDON_FINETUNING = OptimizerConfig(
    name="adamw", learning_rate=5e-5, schedule="cosine", weight_decay=1e-6, clip=5.0, groups=POSEIDON_GROUPS
)
