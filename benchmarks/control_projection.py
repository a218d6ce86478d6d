"""Measure leak against control over the number of directions of the control's projection.

    python -m c2r.quickstart
    python -m benchmarks.control_projection quickstart outputs/control_projection

Phase 2 is trained on the quickstart's phase 1 for 100 steps in each setting: on features with planted leaks, which are
pixels, of early layers, or have a direction of the look, and on the toy's own; without a projection, and with each
number of directions, with and without tail drop. A run takes minutes. A continued command skips the runs that are
finished; a line of the table is printed after each run.
"""

import argparse
from pathlib import Path

from c2r.models.contract import read_contract
from c2r.toy.study_runs import EARLY, LOOK, PIXELS, StudyRun, run_folder, run_phase2, write_leaking_extractors

#: {title: (folder of the extractor, options)}
FEATURES = {
    "pixels": (PIXELS, {"cg_ratio": 0.0}),
    "early layers": (EARLY, {"cg_ratio": 0.0}),
    "look direction": (LOOK, {"cg_ratio": 0.2}),
    "own DINOv3": (None, {"cg_ratio": 0.2}),
}
MEASURES = {
    "leak (coarse)": "leak_share_coarse",
    "control gain": "control_gain",
    "people, own": "people_own",
    "people, other": "people_other",
    "loss, real": "loss_real",
}
#: Held-out figures of the features that the control branch sees, see `Certificate`.
FIGURES = ("cg_or_real", "look", "place", "agreement")


def settings(numbers: list[int | None], tail_drops: list[float]) -> list[tuple[str, str, str, StudyRun]]:
    """Return (features, directions, tail drop, run) of each setting; None for the number that the fit chooses."""
    found = []
    for features, (dinov3, options) in FEATURES.items():
        found.append((features, "all", "", StudyRun(f"{features} unprojected", options, dinov3=dinov3)))
        # Pixels of a place in two looks hardly agree: with some seeds a fit without a number is refused.
        for number in numbers if dinov3 != PIXELS else [number for number in numbers if number is not None]:
            for share in tail_drops:
                projected = {"control_projection": "fit", "control_tail_drop": share}
                if number is not None:
                    projected["control_directions"] = number
                directions = "chosen" if number is None else str(number)
                name = f"{features} {directions} drop {share:g}"
                found.append((features, directions, f"{share:g}", StudyRun(name, options | projected, dinov3=dinov3)))
    return found


def row(out: Path, features: str, directions: str, tail_drop: str, run: StudyRun, seed: int) -> list[str]:
    """Train one setting, unless it is finished, and return its cells."""
    values = run_phase2(out, run, seed).values
    contract = read_contract(run_folder(out, run, seed) / "final")
    certificate = contract.control_certificate or {}
    cells = [values[name] for name in MEASURES.values()]
    cells += [certificate.get(f"{name}_projected") for name in FIGURES]
    return [features, directions, tail_drop, str(seed), *("" if x is None else f"{x:.3f}" for x in cells)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("quickstart", type=Path, help="folder of a finished quickstart")
    parser.add_argument("out", type=Path, help="folder of the runs")
    parser.add_argument("--directions", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--tail_drop", type=float, nargs="+", default=[0.0, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = parser.parse_args()

    args.out.mkdir(parents=True, exist_ok=True)
    links = {"toy": args.quickstart / "toy"}
    links |= {f"phase1-{seed}": args.quickstart / "outputs/phase1" for seed in args.seeds}
    for name, target in links.items():
        if not (args.out / name).exists():
            (args.out / name).symlink_to(target.resolve(strict=True))
    write_leaking_extractors(args.out)

    titles = ["features", "directions", "tail drop", "seed", *MEASURES, *FIGURES]
    print(f"| {' | '.join(titles)} |\n{'|---' * len(titles)}|", flush=True)
    for seed in args.seeds:
        for setting in settings([None, *args.directions], args.tail_drop):
            print(f"| {' | '.join(row(args.out, *setting, seed))} |", flush=True)


if __name__ == "__main__":
    main()
