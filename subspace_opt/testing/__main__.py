"""`python -m subspace_opt.testing --component my_pkg:MySelector`: the conformance kit, with pytest's own options besides."""

from __future__ import annotations

import sys

import pytest

if __name__ == "__main__":
    sys.exit(pytest.main(["-p", "subspace_opt.testing.plugin", "--pyargs", "subspace_opt.testing", *sys.argv[1:]]))
