"""Times of functions that take turns in one process, so that other load on the machine hits them alike.

Import this before jax and PyTorch: it gives both the same number of threads, on the CPU.
"""

import os
import statistics
import time

THREADS = 2
os.environ.setdefault("OMP_NUM_THREADS", str(THREADS))
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads of PyTorch must not take the cores from XLA
os.environ.setdefault("JAX_PLATFORMS", "cpu")


def take_turns(functions: dict, rounds: int) -> dict:
    """Milliseconds of `rounds` calls of each function by name: `{"wall": [...], "cpu": [...]}`, after two warm-ups.

    The processor time ("cpu") counts all threads and depends less on other load.
    """
    times = {name: {"wall": [], "cpu": []} for name in functions}
    for function in functions.values():
        function(), function()
    for _ in range(rounds):
        for name, function in functions.items():
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            times[name]["wall"].append(1e3 * (time.perf_counter() - wall))
            times[name]["cpu"].append(1e3 * (time.process_time() - cpu))
    return times


def of_torch(model, optimizer, x, y):
    """Of a PyTorch network: its weights as arrays, one forward pass, one training step of the mean square error."""
    import numpy as np
    import torch

    weights = {name: t.detach().clone().numpy() for name, t in model.state_dict().items() if torch.is_tensor(t)}
    fields, target = (torch.from_numpy(np.moveaxis(a, -1, 1).copy()) for a in (x, y))

    def forward():
        with torch.inference_mode():
            return np.moveaxis(model(fields).numpy(), 1, -1)

    def step():
        optimizer.zero_grad()
        loss = ((model(fields) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return weights, forward, step


def compare(cases: dict, rounds: int, base: str = "torch") -> list[dict]:
    """Rows for `{what: {who: function}}`: median times, their ratio to `base`, the median ratio within one round."""
    table = []
    for what, functions in cases.items():
        times = take_turns(functions, rounds)
        for who, clocks in times.items():
            row = {"what": what, "who": who}
            for clock, values in clocks.items():
                others = times[base][clock]
                row[f"{clock}_ms"] = round(statistics.median(values), 1)
                row[f"{clock}_ratio"] = round(statistics.median(values) / statistics.median(others), 2)
                row[f"{clock}_paired"] = round(statistics.median(a / b for a, b in zip(values, others, strict=True)), 2)
            table.append(row)
    return table


def markdown(table: list[dict]) -> str:
    """The rows as a table for README.md."""
    names = list(table[0])
    lines = [names, ["---"] * len(names), *([row.get(name, "") for name in names] for row in table)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
