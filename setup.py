"""Builds the package. Its metadata is in pyproject.toml."""

from setuptools import setup

setup()
