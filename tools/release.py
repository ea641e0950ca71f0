"""Rules of a release: what a tag means, what may be uploaded, and whether every member is ready.

python tools/release.py tag framefusion-v0.1.0    what the tag releases; refuses a tag that does not fit the files
python tools/release.py upload framefusion dist/* send the files to the package index; refuses names of other projects
python tools/release.py check [NAME...]           build the members and look into their wheels
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from workspace import ROOT, TAKEN_NAMES, UV, Member, member, members, normalised

TAG = re.compile(r"(?P<name>[a-z0-9]+(?:-[a-z0-9]+)*)-v(?P<version>\d+\.\d+\.\d+(?:(?:a|b|rc)\d+)?)")
MODEL_LIMIT = 8 * 2**20
ALL_MODELS_LIMIT = 36 * 2**20


class ReleaseError(Exception):
    """A release that must not happen, with the reason."""


def taken_reason(name: str) -> str | None:
    """Return why `name` must not be uploaded to the package index, or None when it may be."""
    if normalised(name) not in TAKEN_NAMES:
        return None
    return (
        f"{name} is never uploaded: on the package index the name {normalised(name)!r} belongs to another project. "
        f"It is released as a wheel attached to its tag, and installed from there or from the repository "
        f"(never uploaded: {', '.join(TAKEN_NAMES)})."
    )


def released_by(tag: str, root: Path = ROOT) -> Member:
    """Return the member that `tag` releases; `ReleaseError` when the tag does not fit the files of that member."""
    match = TAG.fullmatch(tag)
    if match is None:
        raise ReleaseError(f"tag {tag!r} is not of the form <name>-v<version>, such as framefusion-v0.1.0")
    try:
        one = member(match["name"], root)
    except LookupError as error:
        raise ReleaseError(f"tag {tag!r}: {error}") from None
    if one.version != match["version"]:
        raise ReleaseError(
            f"tag {tag!r} names version {match['version']}, {one.name}'s pyproject.toml has {one.version}"
        )
    problems = source_problems(one, root)
    if problems:
        raise ReleaseError(f"tag {tag!r}: " + "; ".join(problems))
    return one


def source_problems(one: Member, root: Path = ROOT) -> list[str]:
    """Return what keeps the files of a member from being released."""
    problems = []
    init = (one.source / "__init__.py").read_text(encoding="utf-8")
    if not re.search(rf'^__version__ = "{re.escape(one.version)}"$', init, re.MULTILINE):
        problems.append(f"{one.module}.__version__ is not {one.version}")
    changelog = one.path / "CHANGELOG.md"
    if not changelog.is_file() or not re.search(
        rf"^## {re.escape(one.version)}\b", changelog.read_text(encoding="utf-8"), re.MULTILINE
    ):
        problems.append(f"{one.name}'s CHANGELOG.md has no section '## {one.version}'")
    if (one.path / "LICENSE").read_bytes() != (root / "LICENSE").read_bytes():
        problems.append(f"{one.name}'s LICENSE differs from the one at the root")
    return problems


def wheel_problems(one: Member, wheel: Path) -> list[str]:
    """Return what is wrong with the contents of a built wheel."""
    problems = []
    with zipfile.ZipFile(wheel) as archive:
        entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if not any(name.endswith(".dist-info/licenses/LICENSE") for name in names):
        problems.append(f"{wheel.name} carries no licence text")
    foreign = [name for name in names if not name.startswith((f"{one.module}/", f"{one.module}-"))]
    if foreign:
        problems.append(f"{wheel.name} installs outside {one.module}/: {', '.join(foreign[:5])}")
    models = [entry for entry in entries if entry.filename.endswith(".safetensors")]
    problems += [
        f"{wheel.name}: {entry.filename} has {entry.file_size / 2**20:.1f} MiB, the limit for one model is 8"
        for entry in models
        if entry.file_size > MODEL_LIMIT
    ]
    total = sum(entry.file_size for entry in models)
    if total > ALL_MODELS_LIMIT:
        problems.append(f"{wheel.name}: all models together have {total / 2**20:.1f} MiB, the limit is 36")
    return problems


def build(one: Member, folder: Path) -> Path:
    """Build the wheel of a member into `folder`."""
    command = [UV, "build", "--quiet", "--wheel", "--package", one.name, "--out-dir", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True)
    (wheel,) = folder.glob(f"{one.module}-{one.version}-*.whl")
    return wheel


def check(names: Sequence[str]) -> list[str]:
    """Return every problem of the named members, of all when none is named."""
    problems = []
    with tempfile.TemporaryDirectory(prefix="pared-release-") as folder:
        for one in [member(name) for name in names] or members():
            problems += source_problems(one)
            problems += wheel_problems(one, build(one, Path(folder)))
            print(
                f"{one.name} {one.version}: {'wheel attached to its tag only' if taken_reason(one.name) else 'upload'}"
            )
    return problems


def upload(name: str, files: Sequence[Path]) -> None:
    """Upload the built files of one member through trusted publishing; `ReleaseError` when that must not happen."""
    one = member(name)
    # The files decide as well as the name: a wheel of a refused member must not slip in under another tag.
    for candidate in (one.name, *(file.name.split("-")[0] for file in files)):
        reason = taken_reason(candidate)
        if reason:
            raise ReleaseError(reason)
    strangers = [file.name for file in files if file.name.split("-")[:2] != [one.module, file_version(one, file)]]
    if strangers or not files:
        raise ReleaseError(
            f"a release of {one.name} {one.version} uploads its own files only, got {strangers or 'none'}"
        )
    subprocess.run([UV, "publish", "--trusted-publishing", "always", *map(str, files)], check=True)


def file_version(one: Member, file: Path) -> str:
    """Return the member's version as it stands in the file's name: before `.tar.gz` for a source distribution."""
    return f"{one.version}.tar.gz" if file.name.endswith(".tar.gz") else one.version


def write_outputs(values: dict[str, str]) -> None:
    """Print the values and hand them to later steps of a workflow."""
    lines = "".join(f"{key}={value}\n" for key, value in values.items())
    print(lines, end="")
    if "GITHUB_OUTPUT" in os.environ:
        with open(os.environ["GITHUB_OUTPUT"], "a", encoding="utf-8") as file:
            file.write(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the three commands; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("tag").add_argument("tag")
    commands.add_parser("check").add_argument("names", nargs="*")
    uploading = commands.add_parser("upload")
    uploading.add_argument("name")
    uploading.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args(arguments)
    try:
        if options.command == "tag":
            one = released_by(options.tag)
            reason = taken_reason(one.name)
            if reason:
                print(reason, file=sys.stderr)
            write_outputs({"name": one.name, "version": one.version, "upload": "false" if reason else "true"})
        elif options.command == "upload":
            upload(options.name, options.files)
        else:
            problems = check(options.names)
            if problems:
                raise ReleaseError("\n".join(problems))
    except (ReleaseError, LookupError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
