"""Many steps of any stepper: one scan, chunks of constant memory with a watchdog, and ensembles."""

from physml.rollout.chunks import Chunk, check_spectrum, rollout_chunks
from physml.rollout.ensemble import ensemble, ensemble_devices
from physml.rollout.leads import direct_leads, rollout_stride
from physml.rollout.ledger import Bounds, Divergence, Ledger, Watchdog
from physml.rollout.perturb import perturbed
from physml.rollout.scan import rollout
from physml.rollout.state import named, restore

__all__ = [
    "Bounds",
    "Chunk",
    "Divergence",
    "Ledger",
    "Watchdog",
    "check_spectrum",
    "direct_leads",
    "ensemble",
    "ensemble_devices",
    "named",
    "restore",
    "perturbed",
    "rollout",
    "rollout_chunks",
    "rollout_stride",
]
