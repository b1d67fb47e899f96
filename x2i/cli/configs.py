"""The shipped configurations, for commands."""

from x2i.base.configs import config

__all__ = ["config"]
