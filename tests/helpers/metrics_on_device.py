"""Compute the measures that have a network on the simulated device: NETWORKS.json -> JSON on stdout."""

import json
import sys

import torch

from c2r.metrics.catalogue import MEASURES
from c2r.metrics.clip import EvaluatedClip
from c2r.metrics.registry import make_metrics


def measure_all(networks, device):
    """Return {measure: value} of random videos that are on the device."""

    def video(seed):
        return torch.rand(3, 3, 48, 64, generator=torch.Generator().manual_seed(seed))

    ids = (video(3)[:, 0] * 4).int()
    clips = [
        EvaluatedClip(
            *(f"{seed}.mp4", "a street", video(seed).to(device), video(seed + 10).to(device)),
            *(video(seed + 20).to(device), ids.to(device), (video(4)[:, 0] + 1).to(device)),
        )
        for seed in range(2)
    ]
    metrics, set_metrics, _ = make_metrics([one.name for one in MEASURES if one.role], networks, device)
    values = {metric.name: metric(clips[0]) for metric in metrics}
    for metric in set_metrics:
        for clip in clips:
            metric.update(clip)
        values[metric.name] = metric.compute()
    return values


if __name__ == "__main__":
    with open(sys.argv[1]) as file:
        print(json.dumps(measure_all(json.load(file), "sim")))
