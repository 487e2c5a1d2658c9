"""The rules that keep the shape of the repository, run by tests/test_repo.py.

Every rule carries small bad trees that it must report and, where it could be too eager, a good
one that it must accept. So a rule cannot rot into a check that never fails.
"""

from repo import budgets, csrc, docs, layers, text  # noqa: F401  (importing registers the rules)
from repo.tree import RULES, Tree

__all__ = ["RULES", "Tree"]
