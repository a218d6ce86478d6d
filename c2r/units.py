"""Format bytes and durations for people to read."""

GIB = 2**30


def size_text(num_bytes: float) -> str:
    """Return a number of bytes in decimal units, like "9.22 GB"."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.2f} {unit}"
    return f"{num_bytes / 1e3:.2f} kB"


def duration_text(seconds: float) -> str:
    """Return a duration like "2.5 h", in the largest unit that gives at least 2."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
