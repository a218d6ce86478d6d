"""Simulate the CG monitor: how often its intervals hold the truth, and how often it and its controller act by chance.

    python -m benchmarks.monitor_statistics

The features are normal with a known CG look. There are two clips a file, which share half of their variance. The
tables are:

1. the mean of the CG looks; the share of intervals of 90 % that hold the true CG look, and of those wholly above 0;
2. the share of datasets without any difference between real and CG in which a measure counts;
3. the share of runs whose controller, with a patience of 3, has halved the CG share after 20, 50 and 100 samplings.
   The samples of a sampling correlate with those of the last one, since scenes and seeds are the same. Where the CG
   look equals the bound, each halving is by chance.
"""

import argparse
from itertools import product

import torch

from c2r.evaluation.monitor import MEASURES, MIN_FILES, MIN_SCENES, CGMonitor, Reference
from c2r.evaluation.ratio_controller import RatioController

SIZES = {"texture": 4, "lighting": 4, "geometry": 3, "dinov3": 48}  # of the measures' features
SEPARATION = {"texture": 1.5, "lighting": 1.5, "geometry": 1.5, "dinov3": 0.75}  # in standard deviations
CLIPS_PER_FILE, SHARED = 2, 0.5
SAMPLINGS = (20, 50, 100)


def draw(count: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Return {measure: (count, k)} normal numbers."""
    return {measure: torch.randn(count, k, generator=generator) for measure, k in SIZES.items()}


def draw_domain(num_files: int, look: float, generator: torch.Generator) -> list[tuple[str, dict[str, torch.Tensor]]]:
    """Return (file, features) of clips with a true CG look."""
    scenes, own = draw(num_files, generator), draw(num_files * CLIPS_PER_FILE, generator)
    clips = []
    for i in range(num_files * CLIPS_PER_FILE):
        file = i // CLIPS_PER_FILE
        noise = {m: SHARED**0.5 * scenes[m][file] + (1 - SHARED) ** 0.5 * own[m][i] for m in SIZES}
        clips.append((f"{file}.mp4", {m: noise[m] + look * SEPARATION[m] for m in SIZES}))
    return clips


def draw_monitors(num_files: int, cg_look: float, trials: int) -> list[CGMonitor]:
    """Return monitors of new clips; a `cg_look` of 0 gives domains that do not differ."""
    monitors = []
    for trial in range(trials):
        generator = torch.Generator().manual_seed(trial)
        real, cg = (draw_domain(num_files, look, generator) for look in (0.0, cg_look))
        monitors.append(CGMonitor(Reference.from_clips(real=real, cg=cg)))
    return monitors


def judge(monitor: CGMonitor, noise: dict[str, torch.Tensor], look: float):
    """Return the score of samples with a true CG look, each of a scene of its own."""
    count = len(noise["dinov3"])
    return monitor.judge([{m: noise[m][i] + look * SEPARATION[m] for m in SIZES} for i in range(count)]).look


def interval_row(monitors: list[CGMonitor], num_samples: int, look: float) -> tuple[float, float, float]:
    """Return the mean CG look, the share of intervals that hold the true one, and the share of those above 0."""
    means, held, above = [], 0, 0
    for trial, monitor in enumerate(monitors):
        score = judge(monitor, draw(num_samples, torch.Generator().manual_seed(10**6 + trial)), look)
        means.append(score.mean)
        held += score.low <= look <= score.high
        above += score.low > 0
    return sum(means) / len(means), held / len(means), above / len(means)


def halvings_row(
    monitors: list[CGMonitor], num_samples: int, correlation: float, look: float, bound: float
) -> list[float]:
    """Return the share of runs that have halved their CG share after each number of SAMPLINGS."""
    halved_at = []
    for trial, monitor in enumerate(monitors):
        generator = torch.Generator().manual_seed(10**6 + trial)
        controller, noise = RatioController(bound, patience=3, cg_ratio_min=0.0), draw(num_samples, generator)
        for sampling in range(1, max(SAMPLINGS) + 1):
            if controller.step(judge(monitor, noise, look), 1.0) < 1:
                halved_at.append(sampling)
                break
            news = draw(num_samples, generator)
            noise = {m: correlation * noise[m] + (1 - correlation**2) ** 0.5 * news[m] for m in SIZES}
    return [sum(at <= samplings for at in halved_at) / len(monitors) for samplings in SAMPLINGS]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=200)
    trials = parser.parse_args().trials
    torch.set_num_threads(1)

    monitors = {files: [m for m in draw_monitors(files, 1.0, trials) if m.informative] for files in (MIN_FILES, 16)}
    print(f"{'files':>6s} {'samples':>8s} {'CG look':>8s} {'mean':>6s}  interval holds it  interval above 0")
    for files, num_samples, look in product(monitors, (MIN_SCENES, 8), (0.0, 0.5, 1.0)):
        mean, held, above = interval_row(monitors[files], num_samples, look)
        print(f"{files:6d} {num_samples:8d} {look:8.1f} {mean:6.2f}  {held:17.3f}  {above:16.3f}", flush=True)

    print(f"\n{'files':>6s}  a measure of {len(MEASURES)} counts without a difference")
    for files in (MIN_FILES, 12, 16):
        found = [bool(monitor.informative) for monitor in draw_monitors(files, 0.0, 5 * trials)]
        print(f"{files:6d}  {sum(found) / len(found):.3f}", flush=True)

    print(f"\n{'CG look':>8s} {'bound':>6s} {'correlation':>12s} {'samples':>8s}  share halved after {SAMPLINGS}")
    settings = [(0.5, 0.5, 0.5), (0.5, 0.5, 0.9), (0.5, 0.5, 0.99)]  # CG look, bound, correlation
    settings += [(0.5, 0.25, 0.9), (0.75, 0.5, 0.9), (1.0, 0.5, 0.9)]
    for (look, bound, correlation), num_samples in product(settings, (MIN_SCENES, 8)):
        shares = halvings_row(monitors[MIN_FILES], num_samples, correlation, look, bound)
        print(
            f"{look:8.2f} {bound:6.2f} {correlation:12.2f} {num_samples:8d}  "
            + " ".join(f"{share:.3f}" for share in shares),
            flush=True,
        )


if __name__ == "__main__":
    main()
