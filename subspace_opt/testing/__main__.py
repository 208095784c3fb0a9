"""`python -m subspace_opt.testing --component my_pkg:MySelector`: the conformance kit. It also takes pytest's options."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    # A new process, because pytest rewrites assertions only in modules that are not imported yet.
    pytest = [sys.executable, "-m", "pytest", "-p", "subspace_opt_pytest", "--pyargs", "subspace_opt.testing"]
    sys.exit(subprocess.call([*pytest, *sys.argv[1:]]))
