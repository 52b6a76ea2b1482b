"""How does conditioning a Gaussian of diagonal covariance scale with its n points and m constraints?

python experiments/benchmarks/conditioning.py                  under a minute on two cores; --rounds 3 for a quick look
python experiments/benchmarks/conditioning.py --out FOLDER     also draws FOLDER/conditioning.png

One sample, float32 in and out, mean and diagonal of the posterior under jit, for both precisions of the arithmetic;
medians of runs that take turns. Operations are those of the compiled program, so they do not depend on other load.
Expected: time and operations grow in proportion to n, operations per point with m^2 for large m, memory with n m.
"""

import argparse
import statistics
from pathlib import Path

import turns  # before jax, which it gives two threads

POINTS = (1_000, 10_000, 100_000, 1_000_000)
ROWS = (1, 4, 16)


def problem(n: int, m: int):
    import numpy as np

    random = np.random.default_rng(0)
    mean, variance = random.standard_normal((1, n), np.float32), 0.1 + random.random((1, n), np.float32)
    operator = random.standard_normal((m, n), np.float32) / np.float32(n)
    return mean, variance, operator, np.ones((1, m), np.float32)


def compiled(n: int, m: int, precision: str):
    """A call that waits for its result, operations of the program, and bytes it needs beside what goes in and out."""
    import jax

    from physml.constraints import condition

    given = [jax.device_put(array) for array in problem(n, m)]
    update = jax.jit(lambda *arrays: condition(*arrays, return_diagonal=True, precision=precision))
    program = update.lower(*given).compile()
    cost, memory = program.cost_analysis(), program.memory_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return lambda: jax.block_until_ready(program(*given)), cost["flops"], memory.temp_size_in_bytes


def measure(rounds: int, points, rows) -> list[dict]:
    table = []
    for n in points:
        for m in rows:
            programs = {precision: compiled(n, m, precision) for precision in ("float32", "float64")}
            times = turns.take_turns({name: program[0] for name, program in programs.items()}, rounds)
            for name, (_, operations, memory) in programs.items():
                wall, cpu = (statistics.median(times[name][clock]) for clock in ("wall", "cpu"))
                table.append(
                    {"n": n, "m": m, "precision": name, "wall_ms": round(wall, 3), "cpu_ms": round(cpu, 3),
                     "ns_per_point": round(1e6 * wall / n, 1), "operations_per_point": round(operations / n, 1),
                     "bytes_per_point": round(memory / n, 1)}
                )  # fmt: skip
    return table


def draw(table: list[dict], path: Path):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4.5), layout="constrained")
    for precision, style in (("float32", "o-"), ("float64", "s--")):
        for color, m in enumerate(sorted({row["m"] for row in table})):
            line = [(row["n"], row["wall_ms"]) for row in table if (row["m"], row["precision"]) == (m, precision)]
            axes.loglog(*zip(*line), style, color=f"C{color}", label=f"m = {m}, {precision}")
    ends = [min(row["n"] for row in table), max(row["n"] for row in table)]
    base = max(row["wall_ms"] for row in table if row["n"] == ends[1])
    axes.loglog(ends, [base * ends[0] / ends[1], base], ":", color="gray", label="in proportion to n")
    axes.set(xlabel="points n", ylabel="elapsed, ms", title="Conditioning on m constraints, diagonal covariance")
    axes.legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--points", type=int, nargs="+", default=POINTS)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--out", type=Path, help="folder for conditioning.png")
    args = parser.parse_args()
    table = measure(args.rounds, args.points, args.rows)
    print(turns.markdown(table))
    if args.out:
        draw(table, args.out / "conditioning.png")
        print(f"drawn: {args.out / 'conditioning.png'}")


if __name__ == "__main__":
    main()
