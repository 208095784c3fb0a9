"""Runs the command as `python -m subspace_opt.cli`, for launchers such as torchrun that start a module."""

from . import main

main()
