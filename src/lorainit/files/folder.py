"""A folder's files replaced together: it is the old one, the new one, or plainly not loadable.

Without its configuration no program takes a folder for an adapter. So the old configuration leaves
first, then the other files change places, and the new configuration comes last. A failure puts the old
files back; a kill in between leaves a folder without a configuration, which the next save completes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from lorainit.files.aside import is_aside, make_folder, sweep


@contextlib.contextmanager
def replaced_files(folder: Path, *, key: str, obsolete: Collection[str] = ()) -> Iterator[Path]:
    """A folder aside to write into, whose files take their places in `folder` when the block ends well.

    It lies in `folder` where that is there, so that mount points and links to other disks serve, else
    beside it. Files of other names in `folder` stay.

    Args:
        folder: made if it is not there.
        key: name of the file, there and in subfolders, without which the folder means nothing.
        obsolete: names of files that go, where they are not among the new ones.

    Raises:
        OSError: of the disk's own, or `folder` is a file; what was there before is still there.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file: give a folder")
    there = folder.is_dir()
    parent = folder if there else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    aside, number = make_folder(parent)
    try:
        yield aside
        # What others wrote with a mode of their own gets what the user's umask leaves.
        mode = aside.stat().st_mode & 0o666
        for path in aside.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        if there:
            _swap(aside, folder, key, obsolete)
        else:
            os.rename(aside, folder)
    finally:
        try:
            shutil.rmtree(aside, ignore_errors=True)
        finally:
            try:
                # Again, for what an interrupt has left of it.
                shutil.rmtree(aside, ignore_errors=True)
            finally:
                if number is not None:
                    os.close(number)


def is_interrupted(folder: Path) -> bool:
    """Whether a writer was killed while it replaced files in the folder."""
    return any(is_aside(name) for name in os.listdir(folder))


def _swap(aside: Path, folder: Path, key: str, obsolete: Collection[str]) -> None:
    new = sorted(p.relative_to(aside) for p in aside.rglob("*") if p.is_file())
    keys = [name for name in new if name.name == key]
    rest = [name for name in new if name.name != key]
    gone = [Path(name) for name in obsolete if Path(name) not in new]
    kept = aside / ".old"
    kept.mkdir()
    backups: dict[Path, Path] = {}
    placed: dict[Path, Path] = {}
    try:
        for number, name in enumerate([*keys, *rest, *gone]):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            if _is_there(folder / name):
                # Noted first: an interrupt may come right after the renaming.
                backups[folder / name] = kept / str(number)
                _keep(folder / name, kept / str(number), linked=name in rest)
        for name in [*rest, *keys]:
            placed[folder / name] = aside / name
            os.replace(aside / name, folder / name)
    except BaseException:
        for target, source in placed.items():
            if target not in backups and not _is_there(source):
                target.unlink(missing_ok=True)
        for target, backup in reversed(backups.items()):
            if _is_there(backup):
                os.replace(backup, target)
        raise


def _is_there(path: Path) -> bool:
    return path.is_symlink() or path.exists()


def _keep(old: Path, backup: Path, *, linked: bool) -> None:
    """Under another name; `linked`: under both, so that it is never missing, where links are possible."""
    if linked:
        with contextlib.suppress(OSError, NotImplementedError):
            os.link(old, backup, follow_symlinks=False)
            return
    os.replace(old, backup)
