"""Ideas from Su Jianlin's articles, each a tested module: see the book's page of the same name."""

__version__ = "0.1.0"
