"""The toy: a procedural city, and small models of the real classes trained on it. No downloads, CPU only."""
