"""C2R (Coarse-to-Real): teach Wan 2.1 to turn coarse 3D renderings into real-looking video."""

__version__ = "0.1.0"


class InputError(ValueError):
    """Bad input from the user. The message is one line: the file or option, what is wrong, and what to do."""
