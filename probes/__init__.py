"""Probes: what is observed at a site, how it is judged and recorded."""
