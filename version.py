"""The version, where it can be asked for without loading anything else."""

__version__ = "0.1.0"
