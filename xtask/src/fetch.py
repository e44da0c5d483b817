"""Downloads one wheel, checks it and unpacks it; `xtask setup` runs this with the system's own Python.

    fetch.py NAME FILE SHA256 ROOT URL [PREFIX ...]

URL is empty outside tests: pip's own configuration (index, mirror, proxy, certificates, credentials) then says
where the file is, and pip's own session fetches it, because `pip download` cannot continue a broken download.
Members that start with a PREFIX (all, if there is none) end up below ROOT. Progress goes to stderr. stdout is for
xtask: the unpacked paths, one a line, or, with exit code 1, `kind<TAB>reason`. Standard library and pip only.
"""

import contextlib
import errno
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import time
import zipfile

ATTEMPTS_WITHOUT_PROGRESS = 4
CHUNK = 1 << 20


class Refused(Exception):
    """(kind, reason); the kinds are those of `explain` in setup.rs."""


def say(text, end="\n"):
    sys.stderr.write(text + end)
    sys.stderr.flush()


class Progress:
    """One line that is rewritten on a terminal, a line every 10 % elsewhere."""

    def __init__(self, label):
        self.label, self.shown, self.live = label, None, sys.stderr.isatty()

    def update(self, done, total):
        percent = 100 * done // total if total else 0
        step = percent if self.live else percent // 10 * 10
        if step != self.shown:
            self.shown = step
            text = f"  {self.label}  {done / 1e6:.0f} of {total / 1e6:.0f} MB  {percent} %"
            say("\r\x1b[K" + text if self.live else text, end="" if self.live else "\n")

    def done(self):
        if self.live and self.shown is not None:
            say("")


def size_of(path):
    return os.path.getsize(path) if os.path.exists(path) else 0


def sha256_of(path):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(CHUNK), b""):
            digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def pip_session():
    """pip's command object, options and HTTP session: everything the user has configured, nothing cached."""
    from pip._internal.commands import create_command

    command = create_command("download")
    options, _ = command.parse_args(["--no-cache-dir", "--no-input", "--retries=2", "--disable-pip-version-check"])
    with command.main_context():
        yield command, options, command.get_default_session(options)


def locate(command, options, session, name, file):
    """The address of `file`, from the index that pip is configured for."""
    from pip._internal.models.target_python import TargetPython

    # pip reports an unreachable index only in its log, and then finds nothing.
    problems = []
    handler = logging.Handler()
    handler.emit = lambda record: problems.append(record.getMessage())
    log = logging.getLogger("pip._internal.index.collector")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False

    platforms = file[: -len(".whl")].split("-")[-1].split(".")
    target = TargetPython(platforms=platforms, py_version_info=(3, 11, 0), implementation="cp")
    finder = command._build_package_finder(options, session, target_python=target)
    for candidate in finder.find_all_candidates(name):
        if candidate.link.filename == file:
            return candidate.link.url_without_fragment
    unreachable = [text for text in problems if text.startswith("Could not fetch")]
    if unreachable:
        raise Refused("network", unreachable[-1])
    raise Refused("absent", f"the package index {options.index_url} lists no {file}")


def attempt(session, url, part, progress):
    """Appends what `part` lacks. Returns the size of the whole file, or None if the server did not say."""
    have = size_of(part)
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    with contextlib.closing(session.get(url, headers=headers, stream=True)) as response:
        if response.status_code == 416:
            total = response.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return have
            os.remove(part)
            raise OSError(f"the server has no bytes after {have}, beginning anew")
        if response.status_code not in (200, 206):
            raise OSError(f"HTTP status {response.status_code}")
        resumed = response.status_code == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            os.remove(part)
            raise OSError("the server continued at another place, beginning anew")
        have = have if resumed else 0
        length = response.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if resumed else "wb") as out:
            for block in response.iter_content(CHUNK):
                out.write(block)
                have += len(block)
                progress.update(have, total or have)
        return total


def download(session, url, part, label):
    progress, failures = Progress(label), 0
    while True:
        before = size_of(part)
        try:
            total = attempt(session, url, part, progress)
            if total is None or size_of(part) == total:
                progress.done()
                return
            reason = f"the connection ended after {size_of(part)} of {total} bytes"
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            reason = str(error)
        progress.done()
        failures = 0 if size_of(part) > before else failures + 1
        if failures == ATTEMPTS_WITHOUT_PROGRESS:
            raise Refused("network", reason)
        say(f"  {label}  {reason}; continuing at {size_of(part) / 1e6:.0f} MB")
        time.sleep(2 * failures)


def plain_pip(name, file, sha256, folder):
    """`pip download`, for a pip whose inner modules differ from those used here: cannot resume, otherwise equal."""
    fields = file[: -len(".whl")].split("-")
    requirements = os.path.join(folder, name + ".txt")
    with open(requirements, "w", encoding="utf-8") as out:
        out.write(f"{name}=={fields[1]} --hash=sha256:{sha256}\n")
    platforms = [word for tag in fields[-1].split(".") for word in ("--platform", tag)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--python-version=3.11"]
        + platforms + ["--require-hashes", "--dest", folder, "-r", requirements],
        stdout=sys.stderr, check=False,
    )
    os.remove(requirements)
    if done.returncode:
        raise Refused("network", f"`pip download {name}` ended with exit code {done.returncode}")


def fetch(name, file, sha256, url, folder):
    """The wheel below `folder`, complete and with the right checksum."""
    wheel = os.path.join(folder, file)
    if not os.path.exists(wheel) or sha256_of(wheel) != sha256:
        part, label = wheel + ".part", name.ljust(22)
        try:
            with pip_session() as (command, options, session):
                source = url or locate(command, options, session, name, file)
                download(session, source, part, label)
            os.replace(part, wheel)
        except (ImportError, AttributeError, TypeError):
            plain_pip(name, file, sha256, folder)
    found = sha256_of(wheel)
    if found != sha256:
        os.remove(wheel)
        raise Refused("checksum", f"{file} has SHA-256 {found}, expected {sha256}")
    return wheel


def unpack(wheel, root, prefixes):
    """Unpacks beside the destination and renames, so that no reader ever sees half a file."""
    staging = os.path.join(root, ".unpack")
    shutil.rmtree(staging, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        members = [
            member for member in archive.infolist()
            if not member.is_dir() and member.filename.startswith(tuple(prefixes) or "")
        ]
        for member in members:
            path = archive.extract(member, staging)
            os.chmod(path, 0o755 if member.external_attr >> 16 & 0o111 else 0o644)
    names = [member.filename for member in members]
    for name in names:
        target = os.path.join(root, name)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.replace(os.path.join(staging, name), target)
    shutil.rmtree(staging)
    return names


def main(name, file, sha256, root, url, *prefixes):
    folder = os.path.join(root, ".wheels")
    os.makedirs(folder, exist_ok=True)
    try:
        wheel = fetch(name, file, sha256, url, folder)
        say(f"  {name.ljust(22)}  checksum is right, unpacking")
        print("\n".join(unpack(wheel, root, prefixes)))
    except Refused as refused:
        print("\t".join(refused.args))
        return 1
    except (OSError, zipfile.BadZipFile) as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        free = shutil.disk_usage(root).free / 1e9
        print(f"disk\t{error}; {free:.1f} GB are free" if full else f"files\t{error}")
        return 1
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except KeyboardInterrupt:
        say("")
        print("interrupted\tstopped from the keyboard")
        sys.exit(1)
