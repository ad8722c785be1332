"""Federated learning for materials companies: the model travels to the data."""

from fedmat._version import __version__

__all__ = ["__version__"]
