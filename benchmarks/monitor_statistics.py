"""Simulate the CG monitor: how often its intervals hold the truth, and how often it and its controller act by chance.

    python -m benchmarks.monitor_statistics

The features are normal, two clips a file that share half of their variance. The first table gives the share of
intervals of 90 % that hold the true CG look; the second the share of datasets without any difference between real and
CG in which a measure counts; the third the share of runs whose CG share is halved although the CG look is the bound.
"""

import argparse
from itertools import product

import torch

from c2r.evaluation.monitor import MEASURES, MIN_FILES, CGMonitor, Reference, Score
from c2r.evaluation.ratio_controller import RatioController

SIZES = {"texture": 4, "lighting": 4, "geometry": 3, "dinov3": 48}  # of the measures' features
SEPARATION = {"texture": 1.5, "lighting": 1.5, "geometry": 1.5, "dinov3": 0.75}  # in standard deviations
CLIPS_PER_FILE, SHARED = 2, 0.5


def draw_clips(num_files: int, clips_per_file: int, look: float, generator: torch.Generator):
    """Return (file, features) of clips with a true CG look."""
    clips = []
    for file in range(num_files):
        scene = {m: torch.randn(k, generator=generator) for m, k in SIZES.items()}
        for _ in range(clips_per_file):
            own = {m: torch.randn(k, generator=generator) for m, k in SIZES.items()}
            features = {m: SHARED**0.5 * scene[m] + (1 - SHARED) ** 0.5 * own[m] + look * SEPARATION[m] for m in SIZES}
            clips.append((f"{file}.mp4", features))
    return clips


def draw_monitor(num_files: int, cg_look: float, generator: torch.Generator) -> CGMonitor:
    """Return a monitor of new clips; `cg_look` 0 gives domains that do not differ."""
    domains = {"real": 0.0, "cg": cg_look}
    drawn = {d: draw_clips(num_files, CLIPS_PER_FILE, look, generator) for d, look in domains.items()}
    return CGMonitor(Reference.from_clips(**drawn))


def true_look(monitor: CGMonitor, look: float) -> float:
    """Return the mean score of infinitely many samples, placed between those of infinitely many clips."""
    found = []
    for measure in monitor.informative:
        means = torch.tensor([0.0, look, 1.0])[:, None] * SEPARATION[measure] + torch.zeros(3, SIZES[measure])
        real, value, cg = monitor._scorers[measure](means).tolist()  # the scorers are linear
        found.append((value - real) / (cg - real))
    return sum(found) / len(found)


def coverage(num_files: int, num_samples: int, look: float, trials: int) -> float:
    """Return the share of intervals that hold the true CG look."""
    held = counted = 0
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        monitor = draw_monitor(num_files, 1.0, generator)
        if monitor.informative:
            samples = draw_clips(num_samples, 1, look, generator)
            score = monitor.judge([features for _, features in samples]).look
            held, counted = held + (score.low <= true_look(monitor, look) <= score.high), counted + 1
    return held / counted


def false_informative(num_files: int, trials: int) -> float:
    """Return the share of datasets without a difference in which at least one measure counts."""
    found = [draw_monitor(num_files, 0.0, torch.Generator().manual_seed(trial)).informative for trial in range(trials)]
    return sum(map(bool, found)) / trials


def false_halvings(correlation: float, num_samples: int, samplings: int, trials: int) -> float:
    """Return the share of runs that halve their CG share; each sample's score follows its last one."""
    halved = 0
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        controller, values = RatioController(0.0, 3, 0.0), torch.randn(num_samples, generator=generator)
        for _ in range(samplings):
            error = values.std().item() / num_samples**0.5
            if controller.step(Score(values.mean().item(), error, num_samples - 1, num_samples), 1.0) < 1:
                halved += 1
                break
            noise = torch.randn(num_samples, generator=generator)
            values = correlation * values + (1 - correlation**2) ** 0.5 * noise
    return halved / trials


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    torch.set_num_threads(1)

    print(f"{'files':>6s} {'samples':>8s} {'CG look':>8s}  interval holds it")
    for num_files, num_samples, look in product((MIN_FILES, 16), (4, 8), (0.0, 0.5, 1.0)):
        print(
            f"{num_files:6d} {num_samples:8d} {look:8.1f}  {coverage(num_files, num_samples, look, trials):.3f}",
            flush=True,
        )
    print(f"\n{'files':>6s}  a measure of {len(MEASURES)} counts without a difference")
    for num_files in (MIN_FILES, 16):
        print(f"{num_files:6d}  {false_informative(num_files, trials):.3f}", flush=True)
    print(f"\n{'correlation':>12s} {'samples':>8s} {'samplings':>10s}  CG share halved at the bound")
    for correlation, num_samples, samplings in product((0.0, 0.9, 0.99), (4, 8), (20, 50)):
        share = false_halvings(correlation, num_samples, samplings, 5 * trials)
        print(f"{correlation:12.2f} {num_samples:8d} {samplings:10d}  {share:.3f}", flush=True)


if __name__ == "__main__":
    main()
