"""Counts what training launches on a GPU, without one: kernels and library calls.

Small agents on a GPU are bound by launches, not by arithmetic. XLA's compiler for an H200 needs no
device (see `drivers/h200.py`). Counted are the operations of the optimised program: of one update,
and of one environment step and one gradient step in it, ours and a peer's. Needs
`pip install -e ".[all,cuda]"`.

  python benchmarks/launches.py
  python benchmarks/launches.py cartpole minatar --peer purejaxql=DIR --peer-python DIR/bin/python
  python benchmarks/launches.py cartpole --kernels       # one by one, with their origin
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import speed
from record import RESULTS, commit, compose, write


@dataclass(frozen=True)
class Case:
    """A program: our configuration, what is compiled, and the comparison of speed with the peer.

    `program`: see `drivers/count_library.py`. `compared`: a case of `speed.py`.
    """

    overrides: list[str]
    program: str = "train"
    compared: str | None = None


CASES = {
    "cartpole": Case(["env=cartpole"], compared="cartpole"),
    "minatar": Case(["env=minatar", "env.name=Breakout-MinAtar"], compared="minatar"),
    "minatar_16_seeds": Case(
        ["env=minatar", "env.name=Breakout-MinAtar", "num_seeds=16"], compared="minatar"
    ),
    "craftax": Case(["env=craftax"], compared="craftax"),
    "rnn_memory_chain": Case(["agent=pqn_rnn", "env=memory_chain"], compared="rnn_memory_chain"),
    "vdn_smax": Case(["agent=pqn_vdn", "env=smax"], compared="vdn_smax"),
    "atari_learner": Case(["env=atari"], "rollout"),
    "atari_learner_16_seeds": Case(["env=atari", "num_seeds=16"], "rollout"),
    "cql": Case(["agent=cql", "env=atari"], "batch"),
}
_PEER_UPDATES = 3  # the peer compiles a whole run; the loop over updates is found by its length
_COUNTS = ("update", "env_step", "gradient_step")


def count(case: Case, peer: tuple[str, str] | None) -> dict[str, dict[str, Any]]:
    """Our counts, and those of the peer: its checkout, and the Python that runs it."""
    config = compose(case.overrides)
    request = {"config": config, "program": case.program}
    counted = {"eqx_q": speed.drive(sys.executable, "count_library", request, seed=0)}
    if peer and case.compared:
        path, python = peer
        steps = config["num_envs"] * config["agent"]["rollout_length"]
        compared = speed.configuration(case.overrides, _PEER_UPDATES * steps)
        request = speed.peer_request(speed.CASES[case.compared], compared, path)
        request["num_seeds"] = config["num_seeds"]
        counted["purejaxql"] = speed.drive(python, "count_purejaxql", request, seed=0)
    return counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", help=f"default: all of {', '.join(CASES)}")
    parser.add_argument("--peer", metavar="purejaxql=PATH", help="its checkout")
    parser.add_argument(
        "--peer-python", default=sys.executable, help="a Python with the peer's packages"
    )
    parser.add_argument("--kernels", action="store_true", help="print each kernel with its origin")
    parser.add_argument("--out", type=Path, default=RESULTS / "launches.json")
    args = parser.parse_args()
    cases = args.cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        parser.error(f"unknown: {', '.join(unknown)}; cases are {', '.join(CASES)}")
    name, _, path = (args.peer or "").partition("=")
    if args.peer and (name != "purejaxql" or not Path(path).is_dir()):
        parser.error("the peer is purejaxql: give --peer purejaxql=PATH")
    result: dict[str, Any] = {"peer_commit": commit(Path(path)) if path else None, "cases": {}}
    for case in cases:
        counted = count(CASES[case], (path, args.peer_python) if path else None)
        for who, counts in counted.items():
            kernels = counts.pop("kernels")
            numbers = "  ".join(f"{counts[n]:6,} {n}" for n in _COUNTS if n in counts)
            print(f"{case:<24}{who:<12}{numbers}  {counts['temporary_mb']:8,.0f} MB", flush=True)
            for part, table in kernels.items() if args.kernels else ():
                print(f"  {part}:")
                for kernel, times in table.items():
                    print(f"    {times:4} {kernel}")
        result["cases"][case] = counted
    write(args.out, result)


if __name__ == "__main__":
    main()
