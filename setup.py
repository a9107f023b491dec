"""Installs the Python package; needs neither torch nor a compiler. Metadata lives in pyproject.toml."""

from setuptools import setup

setup()
