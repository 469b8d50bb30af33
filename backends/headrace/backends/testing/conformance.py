"""All of the kit in one class."""

from __future__ import annotations

from headrace.backends.testing.crowds import CrowdTests
from headrace.backends.testing.endings import EndingTests
from headrace.backends.testing.lifecycle import LifecycleTests
from headrace.backends.testing.mixtures import MixtureTests
from headrace.backends.testing.options import OptionTests
from headrace.backends.testing.prefixes import PrefixTests
from headrace.backends.testing.streams import StreamTests
from headrace.backends.testing.tokenizers import TokenizerTests


# pytest runs the tests of the last base first: what the others rest on.
class BackendConformance(
    CrowdTests, EndingTests, OptionTests, StreamTests, PrefixTests, MixtureTests, TokenizerTests, LifecycleTests
):
    """Subclass it and give the subclass a class-scoped fixture ``backend``; attributes are in ``setting.Setting``."""
