"""The house rules as functions from a tree of sources, or a document, to a list of violations.

Nothing here knows where the repository lies, so each rule can be shown to fail on a made-up tree.
"""

from collections.abc import Sequence


def nothing_in(violations: Sequence[str]) -> None:
    """Fails with the violations, a line each."""
    assert not violations, "\n" + "\n".join(violations)
