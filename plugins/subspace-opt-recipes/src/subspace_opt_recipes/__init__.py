"""Presets for subspace_opt, one YAML file each."""
