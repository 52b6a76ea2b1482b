"""How long does a small FNO keep up with forced two-dimensional turbulence?

Kolmogorov flow, 32 x 32 stored points of a 96 x 96 solve, viscosity 0.01, a frame every 0.2 time units; trained on
single steps, rolled out for 200 steps from starts it has never seen.

    make demo          or          physml train experiments/demo.py

Expect the correlation of vorticity to stay above 0.8 at least 3 times as long as persistence's; minutes on 2 cores.
"""

from physml import Evaluation, Experiment, OptimizerConfig, SyntheticConfig, TrainingConfig
from physml.models import FNOConfig

config = Experiment(
    name="demo",
    data=SyntheticConfig(
        "kolmogorov",
        points=32,
        trajectories={"train": 12, "valid": 2, "test": 8},
        steps=150,
        test_steps=260,
        time_step=0.2,
        options={"solver_points": 96, "substeps": 8, "precision": "float32", "warmup": 20.0},
    ),
    model=FNOConfig(width=24, modes=(16,), depth=4),
    training=TrainingConfig(
        steps=1200,
        batch=16,
        optimizer=OptimizerConfig(learning_rate=2e-3, clip=1.0),
        updates_per_call=10,
        validate_every=300,
        checkpoint_every=600,
    ),
    evaluation=Evaluation(steps=200, starts=4, floors=("persistence", "climatology")),
)
