"""Bundles as commands: `dump` writes one from a run, `replay` runs its ops again, `diff` compares two

The format, its writer and its reader are in probes/bundle.
"""
