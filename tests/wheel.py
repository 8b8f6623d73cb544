"""`make wheel`: what the wheel holds, and that it works where there is nothing of the checkout.

The wheel is installed as anybody would, into an environment of its own in a temporary folder. What it depends on is not
downloaded again: a `.pth` file adds the packages of the Python that runs this, whose own `.pth` files, among them that
of the editable install, are not read there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("model", "subnet", "neurons", "scripts")
COMMANDS = (
    "orion --help",
    "orion --version",
    "orion completion bash",
    "orion events schema",
    "orion config template",
    "orion plan --model 8b --stages 4 --json",
    "orion chain --help",
)
LOOK = """
import sys
from pathlib import Path
import model, neurons, scripts, subnet
from subnet.localchain import metadata
from subnet.trust import tolerance
for package in (model, neurons, scripts, subnet):
    assert Path(sys.prefix) in Path(package.__file__).parents, package.__file__
assert metadata.load(slot_ms=12_000) and tolerance.shipped().calibration
"""


def main(wheel: Path) -> str:
    """What was seen. Raises `SystemExit` with what is wrong."""
    files = tracked()
    missing = files - set(zipfile.ZipFile(wheel).namelist())
    if missing:
        raise SystemExit(f"{wheel.name} lacks {', '.join(sorted(missing))}")
    with tempfile.TemporaryDirectory() as folder:
        try_out(wheel.resolve(), Path(folder))
    return f"{wheel.name}: {len(files)} files; {len(COMMANDS)} commands work without the checkout"


def tracked() -> set[str]:
    """Files of the packages in the checkout."""
    command = [shutil.which("git") or "git", "ls-files", *PACKAGES]
    return set(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines())


def try_out(wheel: Path, folder: Path) -> None:
    """Install it and run commands, from a folder of their own."""
    venv.create(folder / "venv")
    programs = folder / "venv" / "bin"
    install = [sys.executable, "-m", "pip", "--python", programs / "python", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True)
    places = sysconfig.get_paths(vars={"base": str(folder / "venv"), "platbase": str(folder / "venv")})
    (Path(places["purelib"]) / "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (folder / "elsewhere").mkdir()
    environment = {"PATH": f"{programs}:{os.defpath}", "HOME": str(folder)}
    for program, *words in (*(line.split() for line in COMMANDS), ["python", "-c", LOOK]):
        done = subprocess.run(
            [programs / program, *words],
            cwd=folder / "elsewhere",
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if done.returncode:
            command = " ".join([program, *words])
            raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


if __name__ == "__main__":
    sys.stdout.write(main(Path(sys.argv[1])) + "\n")
