"""Builds the package; the metadata is in pyproject.toml. The CUDA library of csrc/ is built here."""

from setuptools import setup

setup()
