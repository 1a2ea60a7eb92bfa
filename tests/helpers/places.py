"""Where the repository and its tests are, for files in whichever folder below."""

from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
ROOT = TESTS.parent
