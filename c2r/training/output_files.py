"""Names in a run's output folder that training writes and `python -m c2r.report` reads."""

#: How the run was started; every logged number; the loss of each validation clip.
START, METRICS, VALIDATIONS = "run.json", "metrics.jsonl", "validations.jsonl"

#: A file that the run holds a lock on while it lives.
LOCK = ".lock"

#: The videos of a sample, from left to right.
SAMPLE_COLUMNS = ("control", "with control", "without control", "truth")
