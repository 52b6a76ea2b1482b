"""Many steps of any stepper: one scan, chunks of constant memory with a watchdog, and ensembles."""

from physml.rollout.chunks import Chunk, check_spectrum, check_stored, rollout_chunks
from physml.rollout.ensemble import ensemble, ensemble_devices
from physml.rollout.leads import direct_leads, rollout_stride
from physml.rollout.ledger import Bounds, Divergence, Ledger, Watchdog, check_limit
from physml.rollout.perturb import perturbed
from physml.rollout.scan import reads_calendar, rollout
from physml.rollout.state import named, restore

__all__ = [
    "Bounds",
    "Chunk",
    "Divergence",
    "Ledger",
    "Watchdog",
    "check_limit",
    "check_spectrum",
    "check_stored",
    "direct_leads",
    "ensemble",
    "ensemble_devices",
    "named",
    "restore",
    "perturbed",
    "reads_calendar",
    "rollout",
    "rollout_chunks",
    "rollout_stride",
]
