"""Measures of generated videos: structure, quality, agreement with the prompt, distances between sets of videos.

`c2r.scoring` runs them on all videos of an evaluation and compares models; `c2r.evaluation` is what a training run
measures itself by while it trains.
"""
