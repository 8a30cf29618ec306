"""What is written down twice is written by this: ``python -m docs.generate``, one file a target.

The run config's defaults in ``pyproject.toml``, the tables and the tree of the README, and ``docs/config.md`` come from
the code that they are about.
"""
