"""The `infini` command line and the scripts that start runs."""

__version__ = "0.1.0"
