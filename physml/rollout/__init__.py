"""Many steps of any stepper: one scan, chunks of constant memory with a watchdog, and ensembles."""

from physml.rollout.chunks import Chunk, rollout_chunks
from physml.rollout.ensemble import ensemble, ensemble_devices, stack_members
from physml.rollout.ledger import Bounds, Divergence, Ledger, Watchdog
from physml.rollout.scan import rollout

__all__ = [
    "Bounds",
    "Chunk",
    "Divergence",
    "Ledger",
    "Watchdog",
    "ensemble",
    "ensemble_devices",
    "rollout",
    "rollout_chunks",
    "stack_members",
]
