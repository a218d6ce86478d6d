"""Measure renderings of the toy city as if they were generated: what the measures without a network can tell.

    python -m benchmarks.measures_on_toy [--scenes 16]

Prints a table with the mean, the lowest and the highest value of each measure for pairs of renderings.
"""

import argparse

import torch

from c2r.metrics.structure import blur_ssim, edge_f1
from c2r.toy.city import LOOKS, make_scene, render

#: Look of the generated video, look that it is measured against, offset of the scene.
PAIRS = (("cg", "real", 0), ("cg", "real", 1), ("real", "real", 1), ("cg", "coarse", 0), ("real", "coarse", 0))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=16)
    torch.set_num_threads(1)
    scenes = []
    for seed in range(parser.parse_args().scenes):
        clips = render(make_scene(seed), num_frames=3)
        scenes.append({look: torch.from_numpy(clips[look]).permute(0, 3, 1, 2).float() / 255 for look in LOOKS})
    print("| video | measured against | edge F1 | SSIM of blurred frames |\n|---|---|---|---|")
    for look, other, offset in PAIRS:
        cells = []
        for measure in (edge_f1, blur_ssim):
            pairs = zip(scenes[offset:] + scenes[:offset], scenes)
            values = [measure(video[look], reference[other]) for video, reference in pairs]
            cells.append(f"{sum(values) / len(values):.2f} ({min(values):.2f} to {max(values):.2f})")
        print(f"| {look} look | {other} look of {'another' if offset else 'the same'} scene | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
