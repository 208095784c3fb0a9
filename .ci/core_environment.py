"""Make a virtual environment that has what a wheel depends on, and nothing else: `core_environment.py WHEEL FOLDER`.

The dependencies are those that the wheel's metadata names, without extras, and their own dependencies. Their files are linked from this
environment, where they are installed in the versions of constraints.txt. That takes seconds; pip takes a minute to unpack them again.
"""

import os
import re
import shutil
import sys
import sysconfig
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def dependencies(requirements: list[str]) -> dict[str, Distribution]:
    """The installed distributions that requirements name, and those that these name."""
    found: dict[str, Distribution] = {}
    left = [(Requirement(text), "") for text in requirements]
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name in found and not requirement.extras:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            continue  # pip installs it together with the wheel
        left += [(Requirement(text), each) for text in found[name].requires or () for each in ("", *requirement.extras)]
    return found


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it to another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


wheel, folder = map(Path, sys.argv[1:])
with zipfile.ZipFile(wheel) as archive:
    metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    needed = message_from_bytes(archive.read(metadata)).get_all("Requires-Dist", [])
venv.create(folder, with_pip=True)
own, new = (Path(sysconfig.get_path("purelib", vars={"base": base, "platbase": base})) for base in (sys.prefix, str(folder)))
for name, found in dependencies(needed).items():
    if any(new.glob(f"{name}-*.dist-info")):
        continue  # venv has put its own setuptools there
    for file in found.files or ():
        if file.parts[0] != "..":  # commands beside the packages name the other environment
            link(own / file, new / file)
