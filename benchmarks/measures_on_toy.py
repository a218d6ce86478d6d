"""Measure renderings of the toy city as if they were generated: what the measures without a network can tell.

    python -m benchmarks.measures_on_toy [--scenes 16]

Prints a table with the mean, the lowest and the highest value of each measure for pairs of renderings. A second one
has the quickstart's edge correlation with the real look of the same scene: what a copy of the coarse video reaches,
and what a perfect video does, which still cannot know the sun, the coats and the grain of the true one.
"""

import argparse
from dataclasses import replace

import numpy as np
import torch

from c2r.metrics.structure import blur_ssim, edge_f1
from c2r.toy.city import LOOKS, make_scene, render
from c2r.toy.layout import correlation, edge_map

#: Look of the generated video, look that it is measured against, offset of the scene.
PAIRS = (("cg", "real", 0), ("cg", "real", 1), ("real", "real", 1), ("cg", "coarse", 0), ("real", "coarse", 0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16)
    torch.set_num_threads(1)
    cities = [make_scene(seed) for seed in range(parser.parse_args().scenes)]
    scenes = [rendered(city, LOOKS) for city in cities]
    print("| video | measured against | edge F1 | SSIM of blurred frames |\n|---|---|---|---|")
    for look, other, offset in PAIRS:
        cells = []
        for measure in (edge_f1, blur_ssim):
            pairs = zip(scenes[offset:] + scenes[:offset], scenes)
            values = [measure(video[look], reference[other]) for video, reference in pairs]
            cells.append(f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {look} look | {other} look of {'another' if offset else 'the same'} scene | {' | '.join(cells)} |")
    unknown = [rendered(with_what_a_coarse_video_hides(city), ("real",)) for city in cities]
    print("\n| video | edge correlation |\n|---|---|")
    for title, videos in {
        "coarse look": [scene["coarse"] for scene in scenes],
        "CG look": [scene["cg"] for scene in scenes],
        "real look with another sun, other coats and grain": [scene["real"] for scene in unknown],
    }.items():
        values = [correlation(edge_map(a), edge_map(scene["real"])) for a, scene in zip(videos, scenes)]
        print(f"| {title} | {sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f}) |")


def rendered(scene, looks):
    """Return {look: (F, 3, H, W) in [0, 1]}."""
    clips = render(scene, looks, num_frames=3)
    return {look: torch.from_numpy(clips[look]).permute(0, 3, 1, 2).float() / 255 for look in looks}


def with_what_a_coarse_video_hides(scene):
    """Return a scene of the same coarse video and caption."""
    people = [replace(person, coat=np.roll(person.coat, 1)) for person in scene.people]  # red, green, blue
    return replace(scene, people=people, sun_side=-scene.sun_side, noise_seed=scene.noise_seed + 1)


if __name__ == "__main__":
    main()
