"""Measures of generated videos: structure, quality, agreement with the prompt, distances between sets of videos."""
