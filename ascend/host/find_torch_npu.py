"""Prints "<torch folder>;<torch_npu folder>", or says on stderr what is wrong and exits with 1.

Nothing is imported: torch_npu cannot be without CANN, and through its entry point not even torch.
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec


def minor(text: str) -> str:
    """The first two parts of a version."""
    return ".".join(text.split(".")[:2])


def main() -> str:
    """The answer; raises LookupError with the reason where there is none."""
    found = {}
    for package in ("torch", "torch_npu"):
        spec = find_spec(package)
        if spec is None:
            raise LookupError(f"{package} is not installed in {sys.executable}")
        found[package] = spec.submodule_search_locations[0]
    try:
        versions = [version("torch"), version("torch_npu")]
    except PackageNotFoundError as e:
        raise LookupError(f"no metadata of {e}") from None
    if minor(versions[0]) != minor(versions[1]):
        raise LookupError(
            f"torch_npu {versions[1]} does not go with torch {versions[0]}: "
            f"install torch_npu {minor(versions[0])}.*"
        )
    return ";".join(found.values())


if __name__ == "__main__":
    try:
        print(main())
    except LookupError as e:
        sys.exit(str(e))
