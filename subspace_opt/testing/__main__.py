"""`python -m subspace_opt.testing --component my_pkg:MySelector`: the conformance kit, with pytest's own options besides."""

from __future__ import annotations

import subprocess
import sys

if __name__ == "__main__":
    # A process of its own: pytest wants to see modules before they are imported.
    pytest = [sys.executable, "-m", "pytest", "-p", "subspace_opt_pytest", "--pyargs", "subspace_opt.testing"]
    sys.exit(subprocess.call([*pytest, *sys.argv[1:]]))
