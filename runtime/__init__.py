"""Runs programs: loading, buffers, threads, the disk cache, saved models, profiles. Names are imported from its files."""
