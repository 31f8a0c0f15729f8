"""Reads files below a root, which is a folder or a zip pack, and nothing outside it.

A path in a CSV file is untrusted input: it is normalized, and refused if it leaves the root (by `..`, an absolute path
or a symbolic link). A zip pack is read in place and never unpacked.
"""

import lzma
import ntpath
import os
import posixpath
import stat
import zipfile
import zlib
from collections import Counter
from pathlib import Path

from modules.errors import DataError

MAX_PACK_MEMBERS = 2_000_000
DAMAGE = (  # what zipfile raises; RuntimeError means "encrypted", NotImplementedError "unknown compression"
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError, ValueError,
)  # fmt: skip


class Files:
    """Read access to the files below `root` (a folder or a .zip); a context manager. Threads may share it.

    Raises:
        DataError: the root does not exist, or is neither a folder nor a readable zip.
    """

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self._zip = None
        self._links: dict[str, str] = {}  # folder as written -> real folder; links are resolved once per folder
        if self.root.is_dir():
            self._real_root = os.path.realpath(self.root)
        elif self.root.is_file() and zipfile.is_zipfile(self.root):
            self._open_zip()
        elif self.root.exists():
            raise DataError(f"{self.root}: neither a folder nor a readable zip file; give a folder, a .csv or a .zip")
        else:
            raise DataError(f"{self.root}: does not exist; set `data.root` to a folder, a .csv or a .zip")

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the zip file, if it is one."""
        if self._zip is not None:
            self._zip.close()

    def normalize(self, path: str, where: str) -> str:
        """Canonical form of a path below the root: "./a//b.jpg" -> "a/b.jpg". Messages name its source by `where`.

        Raises:
            DataError: the path is empty, absolute, leads out of the root, or is written as on Windows.
        """
        normal = posixpath.normpath(path.strip()) if path.strip() else ""
        if not normal or normal == "." or "\0" in normal:
            raise DataError(f"{where}: the path {path!r} names no file; write a path relative to {self.root}")
        for root in (os.path.abspath(self.root), os.path.realpath(self.root)):
            if normal.startswith(f"{root}/"):
                inside = normal.removeprefix(f"{root}/")
                raise DataError(f"{where}: the path {path!r} is absolute; write it relative to {self.root}: {inside!r}")
        if normal.startswith("/") or normal == ".." or normal.startswith("../"):
            raise DataError(
                f"{where}: the path {path!r} lies outside {self.root}; bring the file below it and write the path "
                "relative to it"
            )
        on_a_drive = ntpath.isabs(normal)
        if ("\\" in normal or on_a_drive) and self.obstacle(normal):
            turned = normal.replace("\\", "/")
            hint = f": {turned!r}" if not on_a_drive and not self.obstacle(turned) else ""
            raise DataError(
                f"{where}: the path {path!r} is written as on Windows; write it relative to {self.root} with '/' between "
                f"folders{hint}"
            )
        return normal

    def obstacle(self, path: str) -> str:
        """Why the file at the normalized `path` cannot be read, or ""; looks at names only and opens nothing."""
        if self._zip is not None:
            member = self._members.get(path)
            if member is None:
                return "is missing from the zip file"
            if path in self._twice:
                return "is twice in the zip file"
            return "is a symbolic link" if stat.S_ISLNK(member.external_attr >> 16) else ""
        full = self._real_path(path)
        if os.path.commonpath([full, self._real_root]) != self._real_root:
            return f"is a symbolic link that leads out of {self.root}"
        return "" if os.path.isfile(full) else "is missing"

    def read(self, path: str, max_bytes: int = 2**31) -> bytes:
        """The content of the file at the normalized `path`.

        Raises:
            DataError: missing, outside the root, larger than `max_bytes`, or damaged.
        """
        reason = self.obstacle(path)
        if reason:
            raise DataError(f"{self.root}: {path} {reason}")
        size = self._members[path].file_size if self._zip is not None else os.path.getsize(self._real_path(path))
        if size > max_bytes:
            raise DataError(f"{self.root}: {path} holds {size:,} bytes, more than the {max_bytes:,} expected at most")
        try:
            if self._zip is not None:
                return self._zip.read(path)
            with open(self._real_path(path), "rb") as file:
                return file.read()
        except (OSError, *DAMAGE) as error:
            raise DataError(f"{self.root}: {path} cannot be read ({error})") from error

    def folders(self, path: str = "") -> list[str]:
        """Sorted names of the folders in the folder `path`, without hidden ones and those that archivers leave behind.

        Raises:
            DataError: one is a symbolic link (which may leave the root, form a cycle, or show images under two labels),
                a name is not UTF-8, or the folder cannot be read.
        """
        found = [e for e in self._entries(path) if _is_folder(e) and not e.name.startswith((".", "__MACOSX"))]
        for entry in found:
            if entry.is_symlink():
                raise DataError(
                    f"{entry.path}: is a symbolic link to a folder; copy the folder, links are not followed"
                )
        return self._utf8(path, [entry.name for entry in found])

    def names(self, path: str) -> list[str]:
        """Sorted names of the visible files in the folder `path` ("": the root), including links to files.

        Raises:
            DataError: a name is not UTF-8 (as may come from an old archive or a Latin-1 share), or the folder cannot be
                read.
        """
        names = [e.name for e in self._entries(path) if not _is_folder(e) and not e.name.startswith(".")]
        return self._utf8(path, names)

    def _entries(self, path: str) -> list[os.DirEntry]:
        try:
            with os.scandir(self.root / path) as entries:
                return list(entries)
        except OSError as error:
            raise DataError(
                f"{self.root / path}: the folder cannot be read ({error.strerror}); give yourself the right to read it, or "
                "move it elsewhere"
            ) from error

    def _utf8(self, path: str, names: list[str]) -> list[str]:
        for name in names:
            if name.encode("utf-8", "replace").decode() != name:
                raise DataError(
                    f"{self.root / path}: the name {ascii(name)} is not UTF-8, so that no table could hold it; rename it"
                )
        return sorted(names)

    def _open_zip(self) -> None:
        try:
            self._zip = zipfile.ZipFile(self.root)
        except (OSError, *DAMAGE) as error:
            raise DataError(f"{self.root}: is no readable zip file ({error}); pack it again") from error
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        if len(members) > MAX_PACK_MEMBERS:
            raise DataError(f"{self.root}: holds {len(members):,} files, more than {MAX_PACK_MEMBERS:,}; split it")
        self._members = {member.filename: member for member in members}
        self._twice = {name for name, count in Counter(m.filename for m in members).items() if count > 1}

    def _real_path(self, path: str) -> str:
        folder, name = posixpath.split(path)
        if folder not in self._links:
            self._links[folder] = os.path.realpath(os.path.join(self._real_root, folder))
        full = os.path.join(self._links[folder], name)
        return os.path.realpath(full) if os.path.islink(full) else full


def _is_folder(entry: os.DirEntry) -> bool:
    """Whether an entry, or what it links to, is a folder; a link that leads nowhere is a file, which will be missing."""
    try:
        return entry.is_dir()
    except OSError:  # links in a circle, or a target that cannot be looked at
        return False
