"""Evaluate the quickstart's model on fresh scenes of the toy city, and print the table of docs/evaluate.md.

    python -m c2r.quickstart
    python -m benchmarks.evaluate_toy quickstart

The model generates with each scene's own control, with another scene's and with none. A continued command reuses the
videos that are there.
"""

import csv
import json
import sys
from pathlib import Path

import yaml

from c2r import evaluate
from c2r.data.video_writer import write_video
from c2r.scoring.results import RESULTS, interval_text
from c2r.scoring.statistics import Interval
from c2r.toy import city
from c2r.toy.folder import FPS, HEIGHT, NUM_FRAMES, WIDTH

#: The first 8 are the toy's own test scenes; none is trained on.
SEEDS = range(3_000_000, 3_000_016)
STEPS = 20

#: Kinds of control in the table, by the ends of the sources' names.
COLUMNS = {"own control": "own control", "another scene's control": "another scene's", "no control": "none"}


def write_scenes(folder: Path) -> None:
    """Render the scenes and list them in a metadata.csv."""
    rows = [("file_name", "control_name", "text")]
    for seed in SEEDS:
        scene = city.make_scene(seed)
        names = {"real": f"{seed}_truth.mp4", "coarse": f"{seed}_coarse.mp4"}
        rows.append((names["real"], names["coarse"], city.caption(scene, "real")))
        if all((folder / name).exists() for name in names.values()):
            continue  # the same file: its videos need not be made again
        clips = city.render(scene, tuple(names), NUM_FRAMES, FPS, HEIGHT, WIDTH)
        for look, name in names.items():
            write_video(folder / name, clips[look], FPS)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def main():
    quickstart = Path(sys.argv[1])
    out = quickstart / "evaluation"
    write_scenes(out / "scenes")
    config = yaml.safe_load((quickstart / "toy/phase2.yaml").read_text())
    words = ["--model", quickstart / "outputs/phase2/best", "--dataset", out / "scenes", "--output_dir", out]
    words += ["--control", "own", "shuffled", "none", "--num_inference_steps", STEPS]
    for name in ("real_dataset", "cg_dataset", "num_validation_clips"):
        words += [f"--{name}", config[name]]
    evaluate.main([*map(str, words)])
    print("\n".join(markdown(json.loads((out / RESULTS).read_text()))))


def markdown(results):
    """Yield the lines of the table: a row for each measure, and which source is beyond chance larger than which."""
    first = next(iter(results["measures"].values()))
    yield f"| | {' | '.join(COLUMNS[name.rpartition(', ')[2]] for name in first['sources'])} | beyond chance |"
    yield "|---" * (len(first["sources"]) + 2) + "|"
    for name, measure in results["measures"].items():
        cells = [
            interval_text(Interval(*(float("nan") if n[key] is None else n[key] for key in ("mean", "low", "high"))))
            for n in measure["sources"].values()
        ]
        pairs = [d for d in results["differences"] if d["measure"] == name and d["beyond_chance"]]
        larger = [(d["second"], d["first"]) if d["mean"] > 0 else (d["first"], d["second"]) for d in pairs]
        order = "; ".join(f"{short(more)} > {short(less)}" for more, less in larger) or "none"
        yield f"| `{name}` | {' | '.join(cells)} | {order} |"


def short(source):
    return COLUMNS[source.rpartition(", ")[2]].removesuffix(" control").replace(" scene's", "'s")


if __name__ == "__main__":
    main()
