"""The toy: a procedural city and small models of the real classes that know it. No downloads, CPU only."""
