"""Bytes and durations as people read them."""

GIB = 2**30


def size_text(count):
    """A number of bytes as people write it: 9.22 GB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count / 1e3:.2f} kB"


def duration_text(seconds):
    """A time as people write it: 2.5 h."""
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"
